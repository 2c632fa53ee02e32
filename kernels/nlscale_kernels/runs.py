"""Runs of tokens, cut and joined: named tuples of (B, H, T, ...), and (B, T) where one is named `starts`; None stays."""

from typing import Any, TypeVar

import torch
from torch import Tensor

Run = TypeVar("Run", bound=tuple[Any, ...])


def cut(run: Run, first: int, last: int | None = None) -> Run:
    """Tokens `first` ... `last` (views), None: all that follow."""
    parts: list[Tensor | None] = []
    for name, part in zip(run._fields, run, strict=True):  # type: ignore[attr-defined]
        span = slice(first, last)
        parts.append(part if part is None else part[:, span] if name == "starts" else part[:, :, span])
    kind: Any = type(run)
    return kind(*parts)  # type: ignore[no-any-return]


def after(before: Run | None, run: Run) -> Run:
    """The run with the tokens before it; None: there are none."""
    if before is None:
        return run
    parts: list[Tensor | None] = []
    for name, old, new in zip(run._fields, before, run, strict=True):  # type: ignore[attr-defined]
        parts.append(new if new is None else torch.cat([old, new], 1 if name == "starts" else 2))
    kind: Any = type(run)
    return kind(*parts)  # type: ignore[no-any-return]
