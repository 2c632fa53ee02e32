"""Recall beyond attention's window (rows 18, 23): levels inside the row recall what the window must guess."""

import torch

from nlscale.bench.beyond import (
    AFTER,
    ARMS,
    FAR,
    FILLER,
    KEYS,
    MODEL,
    NEAR,
    PAIRS,
    SEEDS,
    SEQUENCE,
    SHOWN,
    WINDOWED,
    learnt,
    table,
    told,
)
from nlscale.config.levels import token_levels
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.testing import ranks


def test_rows_ask_what_they_told() -> None:
    tokens, targets = told(16, NEAR, torch.Generator().manual_seed(3))
    assert tokens.shape == targets.shape == (16, NEAR + AFTER) and tokens[:, 1:].equal(targets[:, :-1])
    for said, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(said[: 2 * PAIRS : 2], said[1 : 2 * PAIRS : 2], strict=True))
        assert len(pairs) == PAIRS and max(pairs) < KEYS <= min(pairs.values())
        assert dict(zip(said[NEAR : NEAR + 2 * PAIRS : 2], wanted[NEAR : NEAR + 2 * PAIRS : 2], strict=True)) == pairs
        between = said[2 * PAIRS : NEAR]
        assert [token % FILLER for token in between] == [place % FILLER for place in range(2 * PAIRS, NEAR)]
        assert not set(between) & {*pairs, *pairs.values()}


def test_arms_are_held_to_their_targets() -> None:
    found = {(name, seed): [0.06 if name == WINDOWED else 0.9] * len(FAR) for name in ARMS for seed in SEEDS}
    rows = table(found)
    assert len(rows) == len(ARMS) * len(FAR) and all(row.ok for row in rows)
    assert sum(row.target != "" for row in rows) == len(ARMS) - len(SHOWN)
    fooled = found | {(WINDOWED, seed): [0.3] * len(FAR) for seed in SEEDS}
    assert [row.name for row in table(fooled) if not row.ok] == [f"{WINDOWED}, {NEAR} tokens"]
    forgot = found | {("and one level moving every 16 tokens", seed): [0.2] * len(FAR) for seed in SEEDS}
    assert [row.ok for row in table(forgot)].count(False) == 1


def test_every_arm_is_a_model_that_there_is() -> None:
    runs = {name: read("demo", [*MODEL, *said]) for name, said in ARMS.items()}
    assert all(far + AFTER <= SEQUENCE for far in FAR) and runs[SHOWN[0]].model.window is None
    assert {len(token_levels(run.levels)) for run in runs.values()} == {0, 1, 2, 3}
    hears = run_of_layers(runs[WINDOWED])
    assert hears < NEAR - 2 * PAIRS  # nothing of what was told reaches what is asked


def run_of_layers(run: Run) -> int:
    """How many tokens back the last layer hears of, by attention alone."""
    assert run.model.window is not None
    return run.model.layers * (run.model.window - 1)


def recalled() -> tuple[list[float], list[float]]:
    """By the window alone, and with a level that moves inside the row; a hundred steps."""
    return learnt(1, ARMS[WINDOWED], 100), learnt(1, ARMS["and one level moving every 16 tokens"], 100)


def test_a_level_inside_the_row_recalls_what_the_window_has_lost() -> None:
    ((window, level),) = ranks(1, recalled, timeout=180)
    assert max(window) < 0.1 and min(level) > 0.5
