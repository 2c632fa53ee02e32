"""What crosses ranks, counted on the wire: a level pays when it moves, and only then."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nlscale.optim.build import build_optimizer
from nlscale.optim.levels import due
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.tiny import micro_batches, tiny

SMALL = 256  # bytes: norms, counts and flags are not what levels save


class Wire(TorchDispatchMode):
    """Bytes that this rank sends on a ring, of every collective with a payload."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for a in args for t in tensors(a)]
            payload, count = max(sizes, default=0), dist.get_world_size()
            if payload > SMALL:
                share = (count - 1) / count * payload
                self.sent += 2 * share if "allreduce" in function._schema.name else share
        return function(*args, **(kwargs or {}))


def tensors(argument: object) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [t for part in argument for t in tensors(part)] if isinstance(argument, list | tuple) else []


def traffic(precision: str) -> list[tuple[float, int, list[str]]]:
    """(bytes on the wire, bytes reported, levels whose weights changed) of each of 8 steps."""
    run = tiny(f"train.precision={precision}")
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world)
    optimizer = build_optimizer(run, model.leaves, world, 100)
    seen = []
    for step in range(1, 9):
        batches = micro_batches(run, step, world.replica, world.replicas)
        before = {name: [leaf.value.clone() for leaf in mover.leaves] for name, mover in optimizer.movers.items()}
        with Wire() as wire:
            moved = optimizer.step(step, model.forward_backward(batches, True)[2].long())
        changed = [
            name
            for name, mover in optimizer.movers.items()
            if any(not torch.equal(old, leaf.value) for old, leaf in zip(before[name], mover.leaves, strict=True))
        ]
        assert changed == list(moved)
        seen.append((wire.sent, sum(optimizer.bytes_sent(moved).values()), changed))
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_counted_bytes_equal_reported_and_fall_with_the_period(precision: str) -> None:
    for steps in ranks(2, traffic, precision):
        assert [wire for wire, _, _ in steps] == [reported for _, reported, _ in steps]
        fast, both, _, all_levels = (wire for wire, _, _ in steps[:4])
        assert fast < both < all_levels and [wire for wire, _, _ in steps[4:]] == [wire for wire, _, _ in steps[:4]]


def test_due_levels_are_a_prefix_and_weights_change_exactly_then() -> None:
    levels = tiny().levels
    for step, (_, _, changed) in enumerate(ranks(2, traffic, "fp32")[0], 1):
        assert changed == [level.name for level in levels if due(level, step)]
        assert changed == [level.name for level in levels][: len(changed)]
