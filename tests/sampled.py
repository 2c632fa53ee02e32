"""Cases of a matrix: `make test` runs a sample, `make matrices` the rest."""

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

import pytest

from nlscale.testing import ranks
from tests.optim.driver import run_steps
from tests.whole import assemble


def sampled(every: Iterable[Any], left: Collection[Any]) -> list[Any]:
    """All cases, those `left` for `make matrices` marked; a case of several values is a tuple."""
    found = []
    for case in every:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[pytest.mark.matrix] if case in left else []))
    return found


@cache
def alone(overrides: tuple[str, ...], steps: int, dtype: Any) -> dict:
    """Final weights of one process, which many layouts are held against (tests/optim/driver.py)."""
    return assemble(ranks(1, run_steps, list(overrides), steps, dtype))
