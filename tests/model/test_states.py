"""A state that must be carried exactly is carried beyond the lengths that were trained on (row 21; the paper's Table 5)."""

from nlscale.bench.states import ARMS, WANTED, Arm, learnt, row
from nlscale.testing import ranks

STEPS = 150  # no row is longer than 20 tokens until then


def test_row_21_parity_is_right_on_rows_four_times_as_long() -> None:
    ((_, beyond),) = ranks(1, learnt, "parity", 1, (), STEPS)
    assert beyond >= WANTED


def test_without_erasing_it_is_not() -> None:
    """A write that only adds cannot turn a state round: the same training leaves a guess."""
    ((_, beyond),) = ranks(1, learnt, "parity", 1, ["model.self_modifying.erase=false"], STEPS)
    assert beyond < 0.7


def test_arms_are_held_to_their_targets() -> None:
    assert not row(Arm("parity", 1), (1.0, 0.99)).ok and row(Arm("parity", 1), (1.0, 0.9995)).ok
    assert row(Arm("parity", 1, "without erasing"), (0.5, 0.5)).ok
    assert {arm.language for arm in ARMS if not arm.other} == {"parity", "(aa)*", "(abab)*"}
