"""Coordinate check: how far five steps move activations, at widths from 64 to 512, with rates that transfer and without.

With muP (config/transfer.py) a step moves each coordinate of an activation equally far at any width, so that the power of
the width in it is 0; without, matrices that grow wider move what they say further and further.
"""

from collections.abc import Sequence
from math import log2
from typing import NamedTuple

import torch
from torch import Tensor

from nlscale.bench.table import Row, show
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.optim.build import build_optimizer
from nlscale.parallel.apply import MicroBatch, parallelize
from nlscale.runtime.world import World, join

WIDTHS = (64, 128, 256, 512)
HEAD, STEPS, SEEDS, VOCABULARY = 16, 5, 2, 512
SHAPE = ("model.layers=3", f"model.vocabulary={VOCABULARY}", "train.precision=fp32", "parallel.tensor=1")
STEADY = ("optim.lr=4e-3", "optim.schedule=wsd", "optim.warmup=0", "optim.decay=0", "optim.weight_decay=0")
TOKENS = 32
ROWS = (f"data.sequence={TOKENS}", "train.global_batch=8", "train.micro_batch=8")
CHUNKS = ("model.self_modifying.chunk=16", "model.self_modifying.maker_chunk=16")
PLACES = ("first block", "last block", "logits")
TOLERANCE = 0.3  # of a power: at such widths what decays with the root of the width is not gone yet


class Arm(NamedTuple):
    """One model that is checked."""

    name: str
    recipe: str
    levels: str  # one that moves every step; or several, of which some move within the steps and some do not


ARMS = (
    Arm("attention", "demo", "plain"),
    Arm("self-modifying Titans", "demo-hope", "plain"),
    Arm("attention, levels 1/4/16/64", "demo", "four"),
    Arm("self-modifying Titans, levels 1/4/16/64", "demo-hope", "four"),
)


def configure(arm: Arm, width: int, transfers: bool) -> Run:
    """The bench's shape at a width."""
    heads = width // HEAD
    wide = [f"model.width={width}", f"model.heads={heads}", f"model.kv_heads={heads}", f"model.hidden={3 * width}"]
    base = [f"model.base_width={WIDTHS[0]}"] if transfers else []
    return read(arm.recipe, [f"use.levels={arm.levels}", *SHAPE, *STEADY, *ROWS, *CHUNKS, *wide, *base])


def batch(seed: int) -> list[MicroBatch]:
    """Rows of random tokens that follow one another by one rule, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (8, TOKENS + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, :-1:2] * 7 + 3) % VOCABULARY
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(8, TOKENS, dtype=torch.bool))]


def moved(run: Run, world: World, seed: int) -> list[float]:
    """Root mean squares of how far the steps move what each of PLACES says."""
    model = parallelize(run, world)
    optimizer = build_optimizer(run, model.leaves, world, STEPS)
    (chunk,), rows, seen = model.chunks, batch(seed), list[Tensor]()
    handles = [block.register_forward_hook(lambda *given: seen.append(given[2][0].detach())) for block in chunk.blocks]
    handles.append(chunk.head.norm.register_forward_hook(lambda *given: seen.append(given[2].detach())))

    def said() -> list[Tensor]:
        seen.clear()
        model.forward_backward(rows, False)
        return [seen[0].clone(), seen[-2].clone(), seen[-1] @ chunk.head.weight.detach().t()]

    before = said()
    for step in range(1, STEPS + 1):
        optimizer.step(step, model.forward_backward(rows, True)[2].long())
    optimizer.arrive()
    after = said()
    for handle in handles:
        handle.remove()
    return [float((new - old).square().mean().sqrt()) for new, old in zip(after, before, strict=True)]


def powers(arm: Arm, transfers: bool, world: World, widths: Sequence[int] = WIDTHS, seeds: int = SEEDS) -> list[float]:
    """The power of the width in each of PLACES, by least squares over the widths; means over seeds."""
    logs = []
    for width in widths:
        each = [moved(configure(arm, width, transfers), world, seed) for seed in range(seeds)]
        logs.append([log2(sum(values) / seeds) for values in zip(*each, strict=True)])
    x = torch.tensor([log2(width) for width in widths], dtype=torch.float64)
    y = torch.tensor(logs, dtype=torch.float64)
    x = x - x.mean()
    return ((x[:, None] * (y - y.mean(0))).sum(0) / x.square().sum()).tolist()  # type: ignore[no-any-return]


def main(target: str | None) -> int:
    """Prints the table; 0 if activations move equally far at every width."""
    run = configure(ARMS[0], WIDTHS[0], True)
    world, table = join(run.parallel, run.cluster, 0), []
    for arm in ARMS:
        with_it, without = (powers(arm, transfers, world) for transfers in (True, False))
        for place, power, plain in zip(PLACES, with_it, without, strict=True):
            ok = abs(power) <= TOLERANCE
            table.append(Row(f"{arm.name}: {place}", power, "power of the width", plain, None, f"+- {TOLERANCE}", ok))
    return show(f"{STEPS} steps at widths {WIDTHS}; baseline: one rate for all", table, target)
