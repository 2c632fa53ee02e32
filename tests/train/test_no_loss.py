"""Steps in which no loss is finite, on any rank: nothing is updated, slow windows stay whole, ten in a row end the run."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nlscale.config.run import Run
from nlscale.runtime.folder import Folder, read_lines
from nlscale.testing import ranks
from nlscale.train import loop
from tests.corpus import small_run
from tests.records import events

LAYOUTS = {
    "one": (1, []),
    "data": (2, []),
    "tensor": (2, ["parallel.tensor=2"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "eager": (2, ["optim.reduce=eager"]),
}
SMALL = ["train.steps=12", "checkpoint.interval=4"]


def steps(run: Run) -> list[dict[str, Any]]:
    """Records of its steps, those without a loss too."""
    return [line for line in read_lines(Folder(Path(run.folder)).metrics) if "throughput/step_seconds" in line]


def held(state: Any) -> dict[str, Tensor]:
    """Weights, masters and moments of this rank, by group and place; what windows hold is left out."""
    optimizer, found = state.optimizer, {leaf.name: leaf.value.clone() for leaf in state.leaves}
    for name, mover in optimizer.movers.items():
        for shard in mover.shards:
            for fragment in optimizer.fragments(shard):
                place = f"{name}/{fragment.leaf.name}/{fragment.start}"
                found |= {f"{place}/{key}": value.clone() for key, value in fragment.values.items() if key != "window"}
    return found


def blinded(run: Run, bad: range, ends: int = 0) -> list[set[str]]:
    """Trains; in these steps no loss is a number, and at `ends` a signal comes. What changed in each of them, by name."""
    plain, changes = loop.train_step, []

    def step(state: Any, *rest: Any) -> Any:
        if state.step + 1 not in bad:
            return plain(state, *rest)
        state.optimizer.arrive()
        before = held(state)
        if state.step + 1 == ends:
            os.kill(os.getpid(), signal.SIGUSR2)
        embeddings = [leaf.value for leaf in state.leaves if leaf.name == "embed.weight"]  # none on later stages
        usual = [value.clone() for value in embeddings]
        for value in embeddings:
            value.fill_(torch.nan)
        report = plain(state, *rest)
        state.optimizer.arrive()
        for value, numbers in zip(embeddings, usual, strict=True):
            value.copy_(numbers)
        after = held(state)
        changes.append({name for name, value in before.items() if not torch.equal(value, after[name])})
        return report

    loop.train_step = step
    loop.train(run)
    return changes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_updated_and_the_run_goes_on(layout: str, prepared: str, tmp_path: Path) -> None:
    """Steps 8 and 9: at 8 both slow levels move by what their windows have, the fast level stays."""
    count, overrides = LAYOUTS[layout]
    run = small_run(prepared, tmp_path, *SMALL, *overrides)
    for at_eight, at_nine in ranks(count, blinded, run, range(8, 10)):
        assert at_nine == set()
        assert at_eight and all("slow" in name or "long" in name for name in at_eight)
    told = steps(run)
    assert [line["step"] for line in told if "train/loss" not in line] == [8, 9] and len(told) == 12
    assert "NaN" not in Folder(Path(run.folder)).metrics.read_text()
    assert [told[7][f"optim/level/{name}/fired"] for name in ("fast", "slow", "long")] == [0, 1, 1]
    assert [(line["step"], line["levels"], line["micro_batches"]) for line in events(run, "skip")] == [
        (8, ["fast"], 2),
        (9, ["fast"], 2),
    ]


def test_ten_in_a_row_end_the_run_and_nine_do_not(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "nine", *SMALL)
    ((*changes,),) = ranks(1, blinded, run, range(2, 11))
    assert len(steps(run)) == 12 and len(changes) == 9
    run = small_run(prepared, tmp_path / "ten", *SMALL)
    with pytest.raises(
        RuntimeError, match="StoppedOnPurpose: losses or gradients were not finite in 10 steps in a row"
    ):
        ranks(1, blinded, run, range(2, 12))
    assert Folder(Path(run.folder)).steps() == []


@pytest.mark.parametrize("asked", [False, True])
def test_what_has_no_loss_is_not_saved(asked: bool, prepared: str, tmp_path: Path) -> None:
    """As its weights may be what is wrong: not where a save is due, or asked for by a signal, and not at the end."""
    run = small_run(prepared, tmp_path, *SMALL)
    if asked:
        with pytest.raises(
            RuntimeError, match="SavedOnSignal: stopped on a signal at step 9, which has no finite loss"
        ):
            ranks(1, blinded, run, range(8, 10), 9)
    else:
        with pytest.raises(RuntimeError, match="StoppedOnPurpose: no loss is finite at step 12, the last"):
            ranks(1, blinded, run, range(8, 13))
    assert Folder(Path(run.folder)).steps() == [4]
    ranks(1, loop.train, run)
    assert Folder(Path(run.folder)).steps()[:2] == [12, 8] and len(steps(run)) == 12
