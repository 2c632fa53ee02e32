"""What levels save: bytes, time of the update, memory; each as a ratio within one run."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nlscale.bench.table import Row, at_most, exactly, show, within
from nlscale.config.levels import Level, level_of, parameter_names
from nlscale.config.model import Model
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.model.count import parameters, sizes
from nlscale.optim.build import Optimizer, build_optimizer
from nlscale.optim.layout import Kind, packed
from nlscale.parallel.apply import parallelize
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.wire import Wire
from nlscale.runtime.world import join
from nlscale.testing import ranks

PERIODS = (1, 4, 16, 64)
NAMES = ("fast", "medium", "slow", "long")
RANKS, NODE, STEPS = 4, 2, 64
SHAPE = ["model.width=192", "model.layers=16", "model.heads=4", "model.hidden=1920", "model.vocabulary=1024"]
REST = ["parallel.tensor=1", "train.precision=fp32", "data.sequence=16", "train.global_batch=4", "train.micro_batch=1"]


@dataclass(frozen=True)
class Measured:
    """One optimizer over 64 steps on one rank."""

    seconds: list[float]  # of each step's update
    sent: list[float]  # bytes on the wire of each step


def levels(periods: Sequence[int]) -> list[Level]:
    """Four levels of equal width."""
    return [Level(name=name, period=period, width=0.25) for name, period in zip(NAMES, periods, strict=True)]


def configure(periods: Sequence[int], *overrides: str) -> Run:
    """The bench's model with these periods."""
    listed = ", ".join(f"{{name: {x.name}, period: {x.period}, width: {x.width}}}" for x in levels(periods))
    return read("demo", [*SHAPE, *REST, f"levels=[{listed}]", *overrides])


def fill(optimizer: Optimizer) -> None:
    """Something to reduce: what backward would have left."""
    for window in optimizer.windows.sums.values():
        if window is not None:
            window.fill_(1e-3)


def updates() -> list[Measured]:
    """All periods 1, 1/4/16/64, and the latter staggered: their steps in turn, so that noise meets all alike."""
    runs = [configure((1, 1, 1, 1)), configure(PERIODS), configure(PERIODS, "optim.phase=staggered")]
    world = join(runs[0].parallel, runs[0].cluster, 0)
    made = [build_optimizer(run, parallelize(run, world).leaves, world, 10_000) for run in runs]
    results, tokens = [Measured([], []) for _ in made], torch.tensor(64)
    for step in range(1, STEPS + 1):
        for optimizer, measured in zip(made, results, strict=True):
            fill(optimizer)
            dist.barrier()
            began = perf_counter()
            with Wire(world.data) as wire:
                optimizer.step(step, tokens)
            dist.barrier()
            measured.seconds.append(perf_counter() - began)
            measured.sent.append(wire.sent)
    return results


def held(overrides: Sequence[str]) -> tuple[float, float]:
    """Bytes that this rank's tensors hold between two steps: in all, and of masters and moments kept on the host."""
    before = live()
    run = configure(PERIODS, *overrides)
    world = join(run.parallel, run.cluster, 0, run.optim.node)
    model = parallelize(run, world)
    optimizer = build_optimizer(run, model.leaves, world, 10_000)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    batch = [(tokens, tokens, tokens.bool())]
    for step in (1, 2):
        optimizer.step(step, model.forward_backward(batch, True)[2].long())
    total = sum(size for key, size in live().items() if key not in before)
    offloaded = [
        m for m in optimizer.movers.values() if run.optim.offload and m.group.level.period >= run.optim.offload
    ]
    rules = [rule for mover in offloaded for shard in mover.shards for rule in shard.rules]
    host = sum(t.numel() * t.element_size() for rule in rules for t in (rule.master, *rule.state.values()))
    return float(total), float(host)


def live() -> dict[int, int]:
    """Bytes of every storage that a tensor holds."""
    gc.collect()
    found = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.device.type != "meta"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}


def predicted(reduce: str, replicas: int) -> float:
    """float32: weights; the slices of shared storage once more; windows by policy; masters and two moments, sharded."""
    run = configure(PERIODS)
    names = list(parameter_names(run.model, run.levels))
    size = dict(zip(names, map(sizes(run.model, run.levels), names), strict=True))
    slices = sum(n for name, n in size.items() if name.split(".")[-2] in ("gate", "up", "down", "q", "k", "v"))
    total = sum(size.values())
    window = {"defer": total, "hierarchical": total / NODE, "eager": total / replicas}[reduce]
    return 4 * (total + slices + window + 3 * total / replicas)


def simulated(model: Model, periods: Sequence[int], replicas: int) -> float:
    """Bytes a rank sends a step on average, bfloat16 gradients and weights, padding included."""
    run_levels, sent = levels(periods), 0.0
    elements = sizes(model, run_levels)
    for level in run_levels:
        mine = [name for name in parameter_names(model, run_levels) if level_of(name, run_levels) is level]
        leaves = [Leaf(n, nn.Parameter(torch.empty(elements(n), device="meta"))) for n in mine]
        flat = packed(Kind("adamw", True), leaves, replicas, 2)
        sent += flat.elements * (2 + 2) * (replicas - 1) / replicas / level.period
    return sent


def rho(model: Model, periods: Sequence[int]) -> float:
    """Sum of width / period (spec 3.10)."""
    each = parameters(model, levels(periods))
    return sum(count / level.period for level, count in zip(levels(periods), each.values(), strict=True)) / sum(
        each.values()
    )


def traffic_rows(every: Measured, mixed: Measured, staggered: Measured) -> list[Row]:
    """Bytes and seconds of the update."""
    example = Model(width=2048, layers=24, heads=16, activation="gelu", vocabulary=32_000, tied=True)
    baseline, value = (simulated(example, periods, 64) / 1e9 for periods in ((1, 1, 1, 1), PERIODS))
    share = rho(configure(PERIODS).model, PERIODS)
    long = (mixed.sent[63] - mixed.sent[0]) / 3  # at step 64 all levels move, at step 1 the first alone
    peaks = [(max(m.sent) - mixed.sent[0]) / long + 1 for m in (staggered, mixed)]
    slowest = [sorted(m.seconds)[-2] / median(every.seconds) for m in (staggered, mixed)]
    return [
        within("bytes a step, 1.27B, 64 replicas (simulated), 1/4/16/64", value, "GB", baseline * 0.578, 0.001),
        within("bytes counted / all periods 1, over sum(w/C)", sum(mixed.sent) / sum(every.sent), "", share, 0.001),
        at_most("update, 1/4/16/64 / all periods 1", sum(mixed.seconds), "s in 64 steps", sum(every.seconds), 0.5),
        at_most("level volumes of the peak step, staggered / 4", peaks[0], "", peaks[1], 1.4 / 4),
        at_most("second slowest update, staggered / aligned", slowest[0], "x all periods 1", slowest[1], 1.0),
    ]


def memory_rows() -> list[Row]:
    """Bytes that a rank holds between steps, against the formula."""
    rows = []
    for reduce in ("defer", "hierarchical", "eager"):
        total, _ = ranks(RANKS, held, [f"optim.reduce={reduce}", f"optim.node={NODE}"])[0]
        rows.append(within(f"resident, {reduce}", total / 1e6, "MB a rank", predicted(reduce, RANKS) / 1e6, 0.05))
    _, host = ranks(RANKS, held, ["optim.offload=16"])[0]
    run = configure(PERIODS)
    slow = [parameters(run.model, run.levels)[name] for name in ("slow", "long")]
    rows.append(within("of it in host memory, offload=16", host / 1e6, "MB a rank", 12 * sum(slow) / RANKS / 1e6, 0.05))
    return rows


def histogram(results: Sequence[Measured]) -> None:
    """How many steps' updates took how long, by powers of two of a millisecond."""
    print(f"{'ms of an update':>16s} {'all periods 1':>14s} {'aligned':>9s} {'staggered':>10s}")
    columns = [[max(0, (int(s * 1e3)).bit_length()) for s in measured.seconds] for measured in results]
    for place in range(min(map(min, columns)), max(map(max, columns)) + 1):
        low, high = (1 << place) >> 1, 1 << place
        counts = [column.count(place) for column in columns]
        print(f"{f'{low} - {high}':>16s} {counts[0]:14d} {counts[1]:9d} {counts[2]:10d}")


def main(target: str | None) -> int:
    """Prints the table; 0 if every target is kept."""
    everyone = ranks(RANKS, updates, timeout=500)
    results = [everyone[0][i] for i in range(3)]
    changed = sum(parameters(configure(PERIODS).model, levels(PERIODS)).values())
    rows = [*traffic_rows(*results), *memory_rows()]
    rows.append(
        exactly(
            "steps of 64 in which the longest level moves",
            sum(b == max(results[1].sent) for b in results[1].sent),
            "",
            1,
        )
    )
    title = (
        f"{changed / 1e6:.1f}M parameters, four levels of equal width, {RANKS} gloo ranks of one thread, {STEPS} steps"
    )
    code = show(title, rows, target)
    histogram(results)
    return code
