"""What levels cost a step: the continuum against our plain Transformer and against a plain torch one, in one process.

On the CPU, wherever it is called: it is the host's work that is compared. On a GPU, see `bench ladder`.
"""

import os
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nlscale.bench.plain import PlainTrainer
from nlscale.bench.table import alternating, at_most, exactly, show
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.optim.build import build_optimizer
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import World, join

SHAPE = ("model.width=256", "model.layers=4", "model.heads=4", "model.kv_heads=4", "model.hidden=704")
REST = ("model.vocabulary=4096", "model.attention=causal", "train.precision=fp32", "parallel.tensor=1")
ROUNDS = 20


class Operations(TorchDispatchMode):
    """Counts ATen operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "aten":
            self.seen[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


class Contestant:
    """Our own step on fixed rows, without loader and logs."""

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.steps = run, 0
        self.model = parallelize(run, world)
        self.optimizer = build_optimizer(run, self.model.leaves, world, 10_000)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One step; gives (summed loss, tokens)."""
        self.steps += 1
        total = self.model.forward_backward([(tokens, targets, torch.zeros_like(tokens, dtype=torch.bool))], True)
        self.optimizer.step(self.steps, total[2].long())
        return total


def configure(levels: str, rows: int, sequence: int) -> Run:
    """The shape of the bench with four levels or one."""
    overrides = [*SHAPE, *REST, f"use.levels={levels}", f"data.sequence={sequence}"]
    return read("demo", [*overrides, f"train.micro_batch={rows}", f"train.global_batch={rows}"])


def data(rows: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and targets (B, T)."""
    ids = torch.randint(0, 4096, (rows, sequence + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def operations(step: Any, batch: Any, steps: int) -> tuple[float, float]:
    """(ATen operations, host reads) a step, over whole periods of all levels; views and allocations count too."""
    with Operations() as counted:
        for _ in range(steps):
            step(*batch)
    return sum(counted.seen.values()) / steps, counted.seen["aten::_local_scalar_dense"] / steps


def idle_cost(contestant: Contestant) -> tuple[int, int]:
    """(operations, host reads) of the optimizer in a step where no level is due, beyond counting the window's tokens."""
    tokens = torch.tensor(1)
    with Operations() as counted:
        contestant.optimizer.windows.count(tokens)
    base = sum(counted.seen.values())
    optimizer, every = contestant.optimizer, contestant.optimizer.groups
    optimizer.groups = [group for group in every if group.level.period > 1]
    with Operations() as counted:
        optimizer.step(1, tokens)
    optimizer.groups = every
    return sum(counted.seen.values()) - base, counted.seen["aten::_local_scalar_dense"]


def main(target: str | None) -> int:
    """Prints the table; 0 if every target is kept."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rows, sequence = 4, 512
    run = configure("four", rows, sequence)
    world = join(run.parallel, run.cluster, 0)
    torch.set_num_threads(1)
    four, one = Contestant(run, world), Contestant(configure("plain", rows, sequence), world)
    plain = PlainTrainer(run.model, sequence, run.optim.lr)
    batch = data(rows, sequence)
    seconds = alternating([lambda c=c: c.step(*batch) for c in (four, one, plain)], ROUNDS)  # type: ignore[misc]
    small = data(1, 16)
    four_small, plain_small = Contestant(configure("four", 1, 16), world), PlainTrainer(run.model, 16, run.optim.lr)
    plain_small.step(*small)
    plain_operations, _ = operations(plain_small.step, small, 1)
    four_operations, _ = operations(four_small.step, small, 64)
    idle_operations, idle_reads = idle_cost(four_small)
    table = [
        at_most("step, 4 levels / 1 level", seconds[0], "s", seconds[1], 1.02),
        at_most("step, 4 levels / torch Transformer", seconds[0], "s", seconds[2], 1.10),
        at_most("ATen operations, 4 levels / torch Transformer", four_operations, "a step", plain_operations, 1.3),
        exactly("operations of levels that are not due", idle_operations, "a step", 0),
        exactly("host reads of levels that are not due", idle_reads, "a step", 0),
    ]
    title = f"width 256, 4 layers, {sequence} tokens, batch {rows}, one thread, {world.device.type}, median of {ROUNDS}"
    return show(title, table, target)
