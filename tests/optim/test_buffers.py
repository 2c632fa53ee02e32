"""megatron-core's buffers serve the fastest level with the same numbers, and reduce behind backward."""

import pytest
import torch

from nlscale.config.errors import UserError
from nlscale.optim.buffers import BufferShard
from nlscale.testing import ranks
from tests.optim.driver import built, run_steps, usual
from tests.tiny import tiny
from tests.whole import assemble

LAYOUTS = {
    "one": (1, []),
    "data": (2, []),
    "buckets": (2, ["optim.bucket=1"]),
    "muon": (2, ["optim.name=muon"]),
    "tensor-sequence-data": (4, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tied-pipeline-data": (4, ["parallel.pipeline=2", "model.tied=true"]),
    "interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_second_sharder_gives_the_same_weights(layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    zero = assemble(ranks(count, run_steps, overrides, 8))
    buffers = assemble(ranks(count, run_steps, ["optim.overlap=true", *overrides], 8))
    for name, weight in zero.items():
        assert (buffers[name] - weight).norm() <= 1e-6 * weight.norm(), name


def reduced(overrides: list[str]) -> tuple[set, bool]:
    """Dtypes of the first level's totals, and whether a reduction sends twice what a gather does."""
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    model.forward_backward(usual(run, 1, world), True)
    (shard,) = optimizer.movers["fast"].shards
    return {total.dtype for total in shard.total()}, shard.bytes_a_reduce == 2 * shard.bytes_a_gather


def test_bf16_gradients_are_reduced_in_float32() -> None:
    assert ranks(2, reduced, ["train.precision=bf16", "optim.overlap=true"]) == [({torch.float32}, True)] * 2


def started(overrides: list[str]) -> tuple[bool, int, int]:
    """(serves the first level alone, flats whose reduction began behind backward, flats)."""
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    shards = [shard for mover in optimizer.movers.values() for shard in mover.shards]
    behind = [shard for shard in shards if isinstance(shard, BufferShard)]
    alone = {shard.level.name for shard in behind} == {"fast"} and all(
        isinstance(shard, BufferShard) == (shard.level.name == "fast") for shard in shards
    )
    optimizer.step(1, model.forward_backward(usual(run, 1, world), True)[2].long())
    model.forward_backward(usual(run, 2, world), True)
    flags = [flag for shard in behind for flag in shard.started]
    return alone, sum(flags), len(flags)


def test_reductions_begin_before_backward_ends() -> None:
    assert ranks(2, started, ["optim.overlap=true"]) == [(True, 2, 2)] * 2
    sequence = ["optim.overlap=true", "parallel.tensor=2", "parallel.sequence=true"]
    assert ranks(2, started, sequence) == [(True, 1, 2)] * 2  # gains wait for the sum of their partial gradients


def test_overlap_needs_a_level_that_moves_every_step() -> None:
    with pytest.raises(UserError, match="needs optim.reduce=defer"):
        tiny("optim.overlap=true", "optim.reduce=eager")


@pytest.mark.parametrize("overrides", [[], ["train.precision=bf16"], ["parallel.tensor=2", "optim.name=sgd"]])
def test_offload_changes_no_number(overrides: list[str]) -> None:
    kept, moved = (assemble(ranks(2, run_steps, [*overrides, f"optim.offload={n}"], 8)) for n in (0, 2))
    assert [name for name in kept if not torch.equal(kept[name], moved[name])] == []
