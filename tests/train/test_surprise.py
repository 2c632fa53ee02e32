"""The local surprise of every block: autograd's gradient at its output, on every layout, and in a run's metrics."""

from pathlib import Path

import pytest
import torch

from nlscale.config.errors import UserError
from nlscale.config.run import Run
from nlscale.parallel.apply import parallelize
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.world import join
from nlscale.testing import ranks
from nlscale.train.loop import train
from nlscale.train.surprise import Surprise
from tests.corpus import small_run
from tests.exact import exact_loss
from tests.tiny import micro_batches, tiny

SMALL = ["model.layers=2", "model.kv_heads=4", "train.global_batch=4", "train.micro_batch=1"]


def watched(run: Run) -> dict[str, float]:
    """After a step's micro-batches."""
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64)
    exact_loss(model, world)
    surprise = Surprise(model.chunks, run.model.layers, world)
    model.forward_backward(micro_batches(run, 0, world.replica, world.replicas), True)
    found = surprise.taken()
    assert surprise.taken() == {}, "a step's is that step's"
    return found


def by_hand(run: Run) -> dict[str, float]:
    """By autograd, from block to block."""
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64).chunks[0]
    squares, tokens = [0.0] * run.model.layers, 0
    for inputs, targets, starts in micro_batches(run, 0, 0, 1):
        x, said = model.enter(inputs), []
        for block in model.blocks:
            x, _ = block(x, model.scene(starts))
            said.append(x)
        slopes = torch.autograd.grad(model.head(x, targets), said)
        squares = [total + float(u.square().sum()) for total, u in zip(squares, slopes, strict=True)]
        tokens += inputs.numel()
    return {f"train/surprise/{layer}": (square / tokens) ** 0.5 for layer, square in enumerate(squares)}


@pytest.mark.parametrize(
    ("count", "layout"),
    [
        (1, []),
        (2, ["parallel.tensor=2", "train.recompute=block"]),
        (2, ["parallel.pipeline=2"]),
        (4, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.context=2"]),
    ],
    ids=["one", "tensor", "pipeline", "tensor-sequence-data", "context"],
)
def test_row_3_surprise_is_the_gradient_at_a_blocks_output(count: int, layout: list[str]) -> None:
    (expected,) = ranks(1, by_hand, tiny(*SMALL))
    assert len(expected) == 2 and min(expected.values()) > 0
    for found in ranks(count, watched, tiny(*SMALL, *layout)):
        assert found == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    "said",
    [
        ["data.replay=corpora/other", "data.replay_batch=4", "levels=[{name: all, replay: 1.0}]"],
        [
            "optim.second_order=true",
            "model.variant=nested",
            "optim.name=sgd",
            "optim.matrix.momentum=0",
            "optim.clip=0",
        ],
    ],
    ids=["replay", "second order"],
)
def test_what_passes_blocks_with_other_rows_is_refused(said: list[str]) -> None:
    tiny(*said)
    with pytest.raises(UserError, match=r"log\.surprise=true needs"):
        tiny("log.surprise=true", *said)


def test_a_run_writes_it(prepared: str, tmp_path: Path) -> None:
    """Where a layer's levels learn inside the row, its output is asked for twice: it is left out."""
    inside = "levels=[{name: quick, period: 8, unit: token, width: 0.5}, {name: slow, period: 4, width: 0.5}]"
    run = small_run(prepared, tmp_path, inside, "log.surprise=true", "train.steps=2")
    ranks(1, train, run)
    for line in (line for line in read_lines(Folder(tmp_path).metrics) if "train/loss" in line):
        assert [name for name in line if "surprise" in name] == ["train/surprise/0"]
        assert line["train/surprise/0"] > 0
