"""Thirty steps are thirty steps: stopped at 15 and started again, a run ends with the same bits.

Step 15 lies inside the windows of both slow levels (periods 4 and 8), so what they had gathered must survive too. Layouts
beyond the first three stop at step 11 of 18, which lies so as well.
"""

import json
import math
import shutil
from pathlib import Path

import pytest

from nlscale.cli import main
from nlscale.runtime.folder import STATE, Folder, read_lines
from nlscale.testing import ranks
from nlscale.train.loop import train
from nlscale.train.manifest import verify
from nlscale.train.pieces import stored
from tests.corpus import small_run
from tests.records import hashes, losses, shards
from tests.sampled import sampled

LAYOUTS = {
    "one": (1, []),
    "tensor": (2, ["parallel.tensor=2"]),
    "tensor-sequence": (2, ["parallel.tensor=2", "parallel.sequence=true", "model.variant=sequential"]),
    "data": (2, []),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "bf16-data": (2, ["train.precision=bf16"]),
    "tensor-pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tensor-data": (4, ["parallel.tensor=2"]),
    "tied-pipeline": (2, ["parallel.pipeline=2", "model.tied=true"]),
    "context-data-hope": (
        4,
        ["parallel.context=2", "model.mixer=self_modifying", "model.self_modifying.chunk=16", "model.layers=2"],
    ),
    "tensor-in-sequence": (
        2,
        [
            "parallel.tensor=2",
            "levels=[{name: quick, period: 8, unit: token, width: 0.5}, {name: slow, period: 4, width: 0.5}]",
        ],
    ),
    "carried-data": (
        2,
        [
            "model.reset=never",
            "data.shuffle=false",
            "model.mixer=titans",
            "model.titans.chunk=8",
            "model.layers=2",
            "levels=[{name: quick, period: 8, unit: token, width: 0.5}, {name: slow, period: 4, width: 0.5}]",
        ],
    ),
    "tied-pipeline-data-eager": (4, ["parallel.pipeline=2", "model.tied=true", "optim.reduce=eager"]),
    "gains-data-hierarchical": (
        4,
        ["model.gains=true", "optim.reduce=hierarchical", "optim.node=2", "train.micro_batch=1"],
    ),
    "muon-data-staggered": (2, ["optim.name=muon", "optim.phase=staggered"]),
    "nested-m3-tensor": (
        2,
        ["parallel.tensor=2", "model.variant=nested", "optim.name=m3", "optim.matrix.slow_period=3"],
    ),
}


LEFT = ("tensor", "pipeline", "bf16-data", "tensor-pipeline", "tensor-data", "tied-pipeline")  # parts of the others
LEFT += ("tensor-in-sequence", "gains-data-hierarchical", "muon-data-staggered", "tied-pipeline-data-eager")


@pytest.mark.parametrize("layout", sampled(LAYOUTS, LEFT))
def test_stopped_and_resumed_equals_unbroken_bit_for_bit(layout: str, prepared: str, tmp_path: Path) -> None:
    count, overrides = LAYOUTS[layout]
    steps, stop = (30, 15) if layout in ("one", "tensor", "data") else (18, 11)
    overrides = [*overrides, f"train.steps={steps}", f"checkpoint.interval={stop}"]
    unbroken = small_run(prepared, tmp_path / "unbroken", *overrides)
    ranks(count, train, unbroken)
    ranks(count, train, small_run(prepared, tmp_path / "resumed", *overrides, f"train.stop_at={stop}"))
    resumed = small_run(prepared, tmp_path / "resumed", *overrides)
    assert len(losses(resumed)) == stop
    ranks(count, train, resumed)
    assert losses(resumed) == losses(unbroken)
    assert len(losses(unbroken)) == steps
    assert shards(resumed, steps) == shards(unbroken, steps)


def test_row_10_a_checkpoint_says_whose_every_tensor_is(
    prepared: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, moments, windows, memories and what token levels learned: each of one learner, with its period and unit."""
    inside = ["train.steps=18", "train.stop_at=11", "checkpoint.interval=11"]  # of the slow level's window
    run = small_run(prepared, tmp_path, *LAYOUTS["carried-data"][1], *inside)
    ranks(2, train, run)
    facts = json.loads((Folder(tmp_path).checkpoint(11) / STATE).read_text())["learners"]
    named = [name for learner in facts.values() for name in learner["tensors"]]
    there = stored(Folder(tmp_path).checkpoint(11))
    once = {f"windows/{name.rsplit('/', 1)[-1]}" if name.startswith("windows/") else name for name in there}
    assert sorted(named) == sorted(once) and sum(each["bytes"] for each in facts.values()) == sum(
        each.nbytes for each in there.values()
    )
    assert {name: (each["period"], each["unit"]) for name, each in facts.items()} == {
        **{"quick": (1, "step"), "slow": (4, "step"), "quick.copy": (8, "token"), "slow.window": (1, "step")},
        **{"memory": (8, "token"), "convolution": (1, "token")},
    }
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "convolution moves every token" in said and "quick.copy moves every 8 tokens" in said
    assert "quick moves every step" in said and "slow moves every 4 steps" in said


MOVES = {
    "tensor2-pipeline2 to one": ((4, ["parallel.tensor=2", "parallel.pipeline=2"]), (1, [])),
    "data4 to tensor2": ((4, ["train.micro_batch=1"]), (2, ["parallel.tensor=2"])),
    "one to tensor2-data2": ((1, []), (4, ["parallel.tensor=2"])),
    "tensor2-sequence to pipeline2": (
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2"]),
    ),
    "hierarchical4 to eager2": (
        (4, ["optim.reduce=hierarchical", "optim.node=2", "train.micro_batch=1"]),
        (2, ["optim.reduce=eager"]),
    ),
    "eager2 to tensor2": ((2, ["optim.reduce=eager"]), (2, ["parallel.tensor=2"])),
    "tensor2-data2 to hierarchical2": ((4, ["parallel.tensor=2"]), (2, ["optim.reduce=hierarchical", "optim.node=1"])),
    "context2-data2 to tensor2": ((4, ["parallel.context=2"]), (2, ["parallel.tensor=2"])),
    "hierarchical over contexts to one": (
        (4, ["parallel.context=2", "optim.reduce=hierarchical", "optim.node=1"]),
        (1, []),
    ),
    "total windows": ((4, ["parallel.tensor=2", "checkpoint.windows=total"]), (2, [])),
}
MOVES_LEFT = ("eager2 to tensor2", "tensor2-data2 to hierarchical2", "data4 to tensor2", "one to tensor2-data2")
MOVES_LEFT += ("tensor2-sequence to pipeline2", "hierarchical over contexts to one")


@pytest.fixture(scope="module")
def unbroken(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], list[int]]]:
    found = {}
    for variant in ("independent", "sequential"):
        run = small_run(prepared, tmp_path_factory.mktemp(variant), f"model.variant={variant}")
        ranks(1, train, run)
        found[variant] = losses(run), hashes(run)
    return found


@pytest.mark.parametrize("variant", sampled(["independent", "sequential"], ["sequential"]))
@pytest.mark.parametrize("move", sampled(MOVES, MOVES_LEFT))
def test_resumed_on_another_layout_equals_unbroken(
    move: str, variant: str, unbroken: dict, prepared: str, tmp_path: Path
) -> None:
    (before, first), (after, second) = MOVES[move]
    common = [f"model.variant={variant}"]
    ranks(before, train, small_run(prepared, tmp_path, *common, *first, "train.stop_at=15"))
    run = small_run(prepared, tmp_path, *common, *second)
    ranks(after, train, run)
    whole, tokens = unbroken[variant]
    assert losses(run) == pytest.approx(whole, rel=2e-4)
    assert hashes(run) == tokens and len(set(tokens)) == 30  # the same global batches at every step


WHOLE = {
    "tied": ("model.tied=true", (2, ["parallel.pipeline=2"]), (2, ["parallel.tensor=2", "parallel.sequence=true"])),
    "gains": ("model.gains=true", (2, ["parallel.tensor=2"]), (2, ["parallel.pipeline=2", "optim.reduce=eager"])),
    "staggered": ("optim.phase=staggered", (2, ["parallel.pipeline=2"]), (2, [])),
    "muon": ("optim.name=muon", (2, ["parallel.tensor=2"]), (2, ["parallel.pipeline=2"])),
    "nested": ("model.variant=nested", (2, []), (2, ["parallel.tensor=2"])),
    "interleaved": ("model.layers=4", (2, []), (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"])),
}


@pytest.mark.parametrize("feature", sampled(WHOLE, ("gains", "staggered", "muon")))
def test_resumed_on_another_layout_with(feature: str, prepared: str, tmp_path: Path) -> None:
    common, (before, first), (after, second) = WHOLE[feature]
    alone = small_run(prepared, tmp_path / "alone", common)
    ranks(1, train, alone)
    ranks(before, train, small_run(prepared, tmp_path / "moved", common, *first, "train.stop_at=15"))
    moved = small_run(prepared, tmp_path / "moved", common, *second)
    ranks(after, train, moved)
    assert losses(moved) == pytest.approx(losses(alone), rel=5e-4)


def test_a_damaged_checkpoint_is_passed_over_aloud(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path, "checkpoint.interval=10", "checkpoint.keep=0")
    ranks(1, train, run)
    expected, folder = losses(run), Folder(tmp_path)
    shutil.rmtree(folder.checkpoint(30))
    shard = next(folder.checkpoint(20).glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    ranks(1, train, run)
    assert losses(run) == expected
    events = {line["event"]: line for line in read_lines(folder.events)}
    assert events["damaged checkpoint"]["step"] == 20 and shard.name in events["damaged checkpoint"]["faults"][0]
    assert events["restore"]["step"] == 10
    assert folder.steps() == [30, 20, 10] and len(folder.damaged()) == 1
    ranks(1, train, run)
    assert read_lines(folder.events)[-1]["event"] == "restore" and read_lines(folder.events)[-1]["step"] == 30


def test_what_a_killed_removal_left_is_no_obstacle(prepared: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (folder.checkpoint(30) / "leftover").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000005.partial").mkdir()
    ranks(1, train, small_run(prepared, tmp_path, "checkpoint.keep=1"))
    assert folder.steps() == [30] and verify(folder.checkpoint(30)) == []
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000030"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.hidden=96", "holds another model"),
        ("model.layers=4", "holds another model"),
        ("model.variant=sequential", "holds another network: model.variant=independent, here model.variant=sequential"),
        (
            "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 2, width: 0.25}, "
            "{name: long, period: 8, width: 0.25}]",
            "slow period=4 adamw decay=1 -> .*period=2",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change: str, words: str, prepared: str, tmp_path: Path) -> None:
    ranks(1, train, small_run(prepared, tmp_path, "train.stop_at=2"))
    with pytest.raises(RuntimeError, match=words):
        ranks(1, train, small_run(prepared, tmp_path, change))


def test_no_good_checkpoint_left_never_starts_from_scratch(prepared: str, tmp_path: Path) -> None:
    ranks(1, train, small_run(prepared, tmp_path, "train.stop_at=2"))
    next(Folder(tmp_path).checkpoint(2).glob("*.distcp")).unlink()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="StoppedOnPurpose: none of the 1 checkpoints"):
            ranks(1, train, small_run(prepared, tmp_path))


def test_gradients_that_stay_infinite_end_the_run_on_purpose(prepared: str, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match="StoppedOnPurpose: losses or gradients were not finite in 10 steps in a row"
    ):
        ranks(1, train, small_run(prepared, tmp_path, "optim.lr=1e30", "optim.warmup=0"))
    skips = [line for line in read_lines(Folder(tmp_path).events) if line["event"] == "skip"]
    assert len(skips) >= 10 and skips[-1]["levels"] == ["fast"]
    assert all(math.isfinite(line["optim/grad_norm"]) for line in read_lines(Folder(tmp_path).metrics))


def test_four_ranks_end_where_one_does(unbroken: dict, prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path, "parallel.tensor=2", "parallel.pipeline=2")
    ranks(4, train, run)
    assert losses(run) == pytest.approx(unbroken["independent"][0], rel=2e-4)
