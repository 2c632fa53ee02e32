"""The alignment of neighbouring levels: its formula at its ends, and in a run, at every layout."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nlscale.config.levels import Level
from nlscale.config.run import Run
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import join
from nlscale.testing import ranks
from nlscale.train.alignment import Alignment
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.tiny import tiny

LEVELS = [Level(name="fast", width=0.5), Level(name="slow", period=4, width=0.25)]
LEVELS += [Level(name="long", period=8, width=0.25), Level(name="still", period=8, width=0.0, frozen=True)]


def moved(fast: torch.Tensor, slow: torch.Tensor) -> list[dict[str, float]]:
    """What is found at steps 2, 4 and 8 where fast and slow levels move by these before steps 4 and 8."""
    run = tiny()
    world = join(run.parallel, run.cluster, 0)
    weights = {
        name: nn.Parameter(torch.ones_like(move)) for name, move in (("fast", fast), ("slow", slow), ("long", slow))
    }
    alignment = Alignment(LEVELS, [Leaf(f"blocks.0.continuum.{n}.up.weight", w) for n, w in weights.items()], world)
    alignment.begin(0)
    found = []
    for step in (2, 4, 8):
        if step > 2:
            weights["fast"].data += fast
            weights["slow"].data += slow
        found.append(alignment.after(step) if alignment.due(step) else {})
    return found


def test_one_along_the_same_inputs_in_any_order_and_nothing_along_others() -> None:
    move, turn = (
        torch.randn(6, 4, dtype=torch.float64),
        torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]).double(),
    )
    mixed = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] @ move
    before, at_four, at_eight = ranks(1, moved, move, 3 * mixed)[0]
    assert before == {} and at_four.keys() == {"fast"} and at_four["fast"] == pytest.approx(1, rel=1e-12)
    assert at_eight.keys() == {"fast"}, "a level that has not moved has no direction"
    across = ranks(1, moved, turn[:1], torch.tensor([[2.0, -1.0, 0.0, 0.0]]).double())[0][1]
    assert across["fast"] == pytest.approx(0, abs=1e-12)
    half = ranks(1, moved, turn, turn[1:])[0][1]
    assert half["fast"] == pytest.approx(1 / 26**0.5, rel=1e-12), "G has 5 along one direction, 1 along another"


def found(run: Run) -> dict[int, dict[str, float]]:
    lines = read_lines(Folder(Path(run.folder or "")).metrics)
    named = {
        line["step"]: {k: v for k, v in line.items() if k.endswith("/alignment")}
        for line in lines
        if "eval/loss" not in line and "train/loss" not in line
    }
    return {step: values for step, values in named.items() if values}


def test_a_run_says_it_when_a_slower_level_has_moved_at_every_layout(prepared: str, tmp_path: Path) -> None:
    common = [
        "log.alignment=true",
        "train.steps=9",
        "levels=[{name: fast, width: 0.5}, {name: slow, period: 4, width: 0.5}]",
    ]
    alone = small_run(prepared, tmp_path / "alone", *common)
    ranks(1, train, alone)
    seen = found(alone)
    assert seen.keys() == {4, 8} and all(0 < each["optim/level/fast/alignment"] < 1 for each in seen.values())
    for name, count, layout in (("tensor", 2, ["parallel.tensor=2"]), ("pipeline", 2, ["parallel.pipeline=2"])):
        run = small_run(prepared, tmp_path / name, *common, *layout)
        ranks(count, train, run)
        for step, values in found(run).items():
            assert values == pytest.approx(seen[step], rel=1e-3), (name, step)
    ranks(1, train, small_run(prepared, tmp_path / "apart", *common, "train.stop_at=6"))
    again = small_run(prepared, tmp_path / "apart", *common)
    ranks(1, train, again)
    assert found(again).keys() == {4}, "a period of which only the end was seen has no move"
