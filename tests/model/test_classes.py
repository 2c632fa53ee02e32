"""Classes that come a few at a time (experiment E8 in small): what its rows are, what is read off a model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nlscale.bench import classes
from nlscale.bench.classes import (
    ARMS,
    ASK,
    AT_ONCE,
    CLASSES,
    NAMES,
    SYMBOLS,
    TOKENS,
    Told,
    as_question,
    as_text,
    course,
    languages,
    rows_for,
    text,
    told,
)
from nlscale.config.read import read
from nlscale.testing import ranks


def test_rows_are_of_their_class_and_ask_for_its_name() -> None:
    successors, which = languages(1), torch.tensor([0, 5, 15])
    symbols = text(successors, which, torch.Generator().manual_seed(0))
    assert symbols.shape == (3, TOKENS) and int(symbols.max()) < SYMBOLS
    assert bool((successors[which[:, None], symbols[:, :-1]] == symbols[:, 1:, None]).any(-1).all())
    tokens, targets = as_question(symbols, which)
    assert tokens[:, -1].tolist() == [ASK] * 3 and targets[:, -1].tolist() == [NAMES + c for c in which.tolist()]
    assert bool((targets[:, :-1] == -1).all()) and torch.equal(tokens[:, :-1], symbols[:, :-1])
    assert torch.equal(as_text(symbols)[1][:, :-1], symbols[:, 1:])


def test_a_name_is_looked_for_among_its_tasks_and_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    every = torch.arange(CLASSES)
    rows = as_question(torch.zeros(CLASSES, TOKENS, dtype=torch.long), every)
    scores = torch.zeros(CLASSES, TOKENS, NAMES + CLASSES)
    scores[every, -1, NAMES + every] = 1.0  # each right ...
    scores[:8, -1, NAMES + 12] = 2.0  # ... but that a name of the last task drowns the first two tasks'
    scores[0, -1, NAMES + 1] = 3.0  # and the first class is taken for the second
    monkeypatch.setattr(classes, "scores", lambda *_: scores)
    model: Any = SimpleNamespace()
    assert told(model, rows) == Told(15 / 16, 8 / 16, 1.0)
    (row,) = rows_for("nested", [Told(0.5, 0.2, 0.9), Told(0.7, 0.2, 0.9)], 0.5)
    assert (row.value, row.ratio) == (pytest.approx(60), pytest.approx(1.2))


def test_every_arm_is_two_recipes_of_one_shape() -> None:
    for first, then in ARMS.values():
        runs = [read("demo", [*classes.MODEL, *said]) for said in (first, then)]
        names = [[level.name for level in run.levels if level.width < 1] for run in runs]
        assert names[0] == names[1] and runs[0].model.variant == runs[1].model.variant
    assert read("demo", [*classes.MODEL, *ARMS["frozen trunk, a quarter moves"][1]]).levels[1].frozen
    assert CLASSES % AT_ONCE == 0


@pytest.mark.matrix
def test_tasks_are_learned_and_replay_keeps_the_earlier_ones() -> None:
    plain, replayed = (
        ranks(1, course, name, 1, (96, 48))[0] for name in ("one level, rate x 1", "replay, an eighth of the rows")
    )
    assert plain.fresh > 0.4 and replayed.own > plain.own + 0.05
    assert plain.all < 0.35, "names of earlier tasks are lost"
