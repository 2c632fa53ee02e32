"""Levels at work on random rows, and what they leave behind."""

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.run import Run
from nlscale.optim.build import Optimizer, build_optimizer
from nlscale.optim.shard import fragments
from nlscale.parallel.apply import Parallelized, parallelize
from nlscale.runtime.world import World, join
from tests.tiny import micro_batches, tiny
from tests.whole import Pieces

STEPS = 10
CONSTANT = ["optim.schedule=wsd", "optim.warmup=0", "optim.decay=0", "optim.lr=0.01"]
PLAIN = "levels=[{name: all, period: 1, width: 1.0}]"
LAYOUTS = {
    "one": (1, []),
    "data": (2, []),
    "tensor-data": (4, ["parallel.tensor=2"]),
    "pipeline-data": (4, ["parallel.pipeline=2"]),
    "data4": (4, []),
}
Batches = Callable[[Run, int, World], Sequence[tuple[Tensor, Tensor, Tensor]]]


def usual(run: Run, step: int, world: World) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
    """This replica's micro-batches of a step."""
    return micro_batches(run, step, world.replica, world.replicas)


def built(run: Run, dtype: torch.dtype | None = None) -> tuple[World, Parallelized, Optimizer]:
    """A world, a model and its optimizer, whose schedule is 100 steps long."""
    world = join(run.parallel, run.cluster, run.train.seed, run.optim.node)
    model = parallelize(run, world, dtype)
    return world, model, build_optimizer(run, model.leaves, world, 100)


def weights(model: Parallelized, world: World) -> Pieces:
    """This rank's weights by name."""
    return {leaf.name: (leaf.value.clone(), leaf.shard, world.tensor_rank) for leaf in model.leaves}


def run_steps(
    overrides: Sequence[str], steps: int = STEPS, dtype: torch.dtype | None = None, batches: Batches = usual
) -> Pieces:
    """Final weights of a run."""
    run = tiny(*overrides)
    world, model, optimizer = built(run, dtype)
    for step in range(1, steps + 1):
        optimizer.step(step, model.forward_backward(batches(run, step, world), True)[2].long())
    return weights(model, world)


def state_tensors(model: Parallelized, optimizer: Optimizer, world: World) -> dict[str, Tensor]:
    """Every tensor of this rank that belongs to a level: weights, masters and what the rules remember."""
    tensors = {f"compute/{leaf.name}": leaf.value for leaf in model.leaves}
    for mover in optimizer.movers.values():
        for fragment in (f for shard in mover.shards for f in fragments(shard, world)):
            for name, values in fragment.values.items():
                tensors[f"{name}/{fragment.leaf.name}/{fragment.start}"] = values
    return tensors


def digest(tensor: Tensor) -> str:
    """Of a tensor's bits."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def over_replicas(world: World, value: object) -> list:
    """The value of every replica of this shard."""
    everyone: list = [None] * world.replicas
    dist.all_gather_object(everyone, value, group=world.data)
    return everyone
