"""The stream of two languages (experiment E1 in small): what its rows are, what is read off a course, that arms differ."""

import pytest
import torch

from nlscale.bench.forgetting import (
    ARMS,
    LEAST,
    SUCCESSORS,
    SWEPT,
    SYMBOLS,
    TOKENS,
    Course,
    Reset,
    course,
    language,
    recovered,
    reset_rows,
    rows_for,
    rows_of,
)
from nlscale.config.read import read
from nlscale.testing import ranks


def test_rows_follow_their_language() -> None:
    a, b = language(2), language(3)
    assert a.shape == (SYMBOLS, SUCCESSORS) and not torch.equal(a, b)
    assert all(len(set(row)) == SUCCESSORS for row in a.tolist())
    tokens, targets = rows_of(a, 8, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (8, TOKENS) and torch.equal(tokens[:, 1:], targets[:, :-1])
    assert bool((a[tokens] == targets[..., None]).any(-1).all())


def test_losses_are_compared_where_the_second_language_is_known_equally_well() -> None:
    seen = Course([(9.0, 1.4), (5.0, 1.5), (2.0, 4.0), (1.5, 6.0), (1.75, 5.0), (1.25, 8.0)], 40)
    assert (seen.at(10.0), seen.at(5.0), seen.at(2.0), seen.at(1.0)) == (1.4, 1.5, 4.0, 8.0)
    assert (seen.at(7.0), seen.at(1.625), seen.at(1.5), seen.at(1.375)) == (1.45, 5.5, 6.0, 7.25)
    arm, again = rows_for(SWEPT[0], [seen, Course([(9.0, 1.4), (5.0, 3.0), (1.0, 4.0)], 48)], [2.0, 3.0], (3.0, 4.0))
    assert (arm.value, arm.baseline, again.value, seen.learnt) == (3.75, 3.5, 44, 1.4)
    assert "+0.25, standard error 0.75" in arm.unit


def test_the_reset_is_held_to_the_best_single_level() -> None:
    """By two standard errors of the difference with the same seed, where one level knows as much of B; and to half of A."""
    resets = [Reset(1.0, 5.0, 3.0, 2.0), Reset(1.0, 4.0, 2.4, 1.8)]
    for one, two, ok in ((3.6, 2.9, True), (4.5, 2.5, False), (3.0, 2.4, False)):
        worse = [Course([(9.0, 1.0), (3.0, 3.0), (1.0, 9.0)], 0)] * 2
        share, after = reset_rows(
            resets, [worse, [Course([(9.0, 1.0), (2.0, one)], 0), Course([(9.0, 1.0), (1.8, two)], 0)]]
        )
        assert (share.value, share.ok) == (pytest.approx((1 / 2 + 1.6 / 3) / 2), True)
        assert (after.value, after.baseline, after.ok) == (2.7, (one + two) / 2, ok)
    assert not reset_rows([Reset(1.0, 3.0, 2.2, 2.0)], [[Course([(9.0, 1.0), (2.0, 3.0)], 0)]])[0].ok


def test_every_arm_is_a_recipe_of_its_own() -> None:
    runs = {name: read("demo", said) for name, said in ARMS.items()}
    assert len({runs[name].optim.lr for name in SWEPT}) == len(SWEPT) >= 4
    assert runs["elastic weight consolidation"].levels[0].anchor and runs["orthogonal moves"].levels[0].project
    for name, count in (("four levels, nested", 4), ("two levels, nested", 2)):
        assert runs[name].model.variant == "nested" and len(runs[name].levels) == count


def test_row_20_a_reset_brings_back_what_was_not_yet_handed_on() -> None:
    """A short stream: the slow copy follows half of the way, so about 1 - 1/4 of what was forgotten comes back."""
    found = ranks(1, recovered, 1, (96, 16))[0]
    assert found.before > found.learnt + 0.05 and found.share > LEAST


def test_a_second_language_takes_the_first_and_an_anchor_holds_it() -> None:
    """A short stream: one level forgets A while it learns B; replay of A keeps some, and what is anchored moves less."""
    arms = ("one level, rate x 1", "elastic weight consolidation", "replay, an eighth of the rows")
    plain, anchored, replayed = (ranks(1, course, name, 1, (48, 16, 8))[0] for name in arms)
    for each in (plain, anchored, replayed):
        assert len(each.looks) == 5 and each.learnt < 4.3
    assert plain.looks[-1][1] > plain.learnt + 0.1 and plain.looks[-1][0] < plain.looks[0][0]
    assert replayed.looks[-1][1] < plain.looks[-1][1]
    assert anchored.looks[-1][1] - anchored.learnt < plain.looks[-1][1] - plain.learnt
