"""Row 30: replayed rows reach the windows of the levels that count them, as much as these say, and nothing else."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from nlscale.config.errors import UserError
from nlscale.runtime.folder import Folder, read_lines
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.optim.driver import built, usual
from tests.tiny import tiny
from tests.whole import Pieces, assemble

LEVELS = "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 2, width: 0.25, replay: 0.5}, "
LEVELS += "{name: long, period: 4, width: 0.25, replay: 2.0, match: [head.weight]}]"
REPLAY = ["data.replay=anything", "data.replay_batch=8"]
LAYOUTS = {
    "one": (1, []),
    "tensor-sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline-data": (4, ["parallel.pipeline=2"]),
    "sequential": (1, ["model.variant=sequential"]),
}


def windows(overrides: list[str], passes: str) -> Pieces:
    """Open windows after new rows (n), replayed ones (r), and those read as if they were new (e), in this order."""
    run = tiny(LEVELS, *REPLAY, *overrides)
    world, model, optimizer = built(run, torch.float64)
    assert model.replayed is not None
    new, earlier = usual(run, 1, world), usual(run, 9, world)
    reads = {
        "n": partial(model.forward_backward, new, True),
        "r": partial(model.replayed, earlier),
        "e": partial(model.forward_backward, earlier, True),
    }
    for each in passes:
        reads[each]()
    return {
        leaf.name: (optimizer.windows.of(leaf).clone(), leaf.shard, world.tensor_rank)
        for leaf in model.leaves
        if not leaf.partial and "norm" not in leaf.name and leaf.name != "embed.weight" and world.replica == 0
    }


def share(name: str) -> float:
    return 0.5 if ".slow." in name else 2.0 if ".long." in name or name == "head.weight" else 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replayed_gradients_reach_the_levels_that_count_them(layout: str) -> None:
    count, said = LAYOUTS[layout]

    new, both, old, again = (assemble(ranks(count, windows, said, passes)) for passes in ("n", "nr", "r", "e"))
    tolerance = 1e-6 if layout == "tensor-sequence" else 1e-12
    for name in new:
        weight = share(name)
        expected = new[name] + weight * again[name]
        assert again[name].norm() > 0
        assert (both[name] - expected).norm() <= tolerance * expected.norm(), name
        if not weight:
            assert torch.equal(both[name], new[name]) and not old[name].any(), name


def test_a_window_counts_replayed_targets_as_its_level_says() -> None:
    def tokens() -> list[float]:
        run = tiny(LEVELS, *REPLAY)
        _, _, optimizer = built(run)
        optimizer.step(1, torch.tensor(100), torch.tensor(40))
        return optimizer.windows.tokens.tolist()

    assert ranks(1, tokens)[0] == [0.0, 120.0, 180.0]


def test_a_run_that_replays_is_resumed_bit_for_bit(prepared: str, tmp_path: Path) -> None:
    said = [
        "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 4, width: 0.5, replay: 0.7}]",
        f"data.replay={prepared}",
        "data.replay_batch=2",
        "train.micro_batch=1",
    ]
    for folder, stop in (("once", 30), ("twice", 15)):
        ranks(2, train, small_run(prepared, tmp_path / folder, *said, f"train.stop_at={stop}"))
    ranks(2, train, small_run(prepared, tmp_path / "twice", *said))
    once, twice = (
        [(line["train/loss"], line["train/replay_loss"]) for line in read_lines(Folder(tmp_path / folder).metrics)]
        for folder in ("once", "twice")
    )
    assert once == twice and len(once) == 30 and once[0][0] != once[0][1]
    facts = json.loads((Folder(tmp_path / "twice").checkpoint(30) / "train_state.json").read_text())
    assert facts["replay"]["loader"]["step"] == 30


def test_levels_that_do_not_count_them_move_as_if_nothing_were_replayed(prepared: str, tmp_path: Path) -> None:
    """While the one level that counts replayed rows gathers, all others make the same run, bit for bit."""
    levels = "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 2, width: 0.25}, "
    levels += "{name: long, period: 16, width: 0.25, replay: %s}]"
    rows = [f"data.replay={prepared}", "data.replay_batch=4"]
    for folder, share, replay in (("with", 1.0, rows), ("without", 0.0, [])):
        ranks(1, train, small_run(prepared, tmp_path / folder, levels % share, *replay, "train.stop_at=8"))
    told, plain = (
        [{key: line[key] for key in line if key.startswith(("train/loss", "optim/"))} for line in lines]
        for lines in (read_lines(Folder(tmp_path / folder).metrics) for folder in ("with", "without"))
    )
    moved = [key for line in told for key in line if key.endswith("update_norm")]
    assert told == plain and len(told) == 8 and len(moved) == 12


ROWS = ["data.replay=rows", "data.replay_batch=4"]
COUNTED = "levels=[{name: a, replay: 1.0}]"
REFUSED = {
    "rows without a number": (ROWS[:1], "replay needs both data.replay=rows and data.replay_batch=0"),
    "no rows": ([COUNTED], "replay needs rows: data.replay and data.replay_batch"),
    "no level": (ROWS, "a level that counts it, such as levels.long.replay=1.0"),
    "overlap": ([*ROWS, COUNTED, "optim.overlap=true"], "replay needs optim.overlap=false"),
    "negative": (["levels=[{name: a, replay: -1.0}]"], "levels.a.replay=-1.0 must not be negative"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_replay_that_cannot_work_is_refused(case: str) -> None:
    overrides, words = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        tiny(*overrides)
    assert words in str(refusal.value)
