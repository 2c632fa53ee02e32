"""What the benches of memory tasks share."""

import pytest

from nlscale.bench.drill import side_by_side


def test_jobs_are_told_in_order_and_an_error_is_told_too() -> None:
    jobs = {"first": (7, 2), "second": (9, 4)}
    assert list(side_by_side(divmod, jobs)) == [("first", (3, 1)), ("second", (2, 1))]
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(divmod, jobs | {"wrong": (1, 0)}))
