"""Tokens a second, MFU and peak memory of the ladder's small sizes on one GPU, with torch.compile and without.

Each size as the control, HOPE-Attention and HOPE, one process each, so that what one leaves on the GPU is not another's;
random rows of 4,096 tokens, the micro-batch of the shipped layout for one GPU.
"""

from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import torch

from nlscale.bench.memory import predicted
from nlscale.bench.rows import random_rows
from nlscale.bench.table import Row, gpu_here, show, within
from nlscale.config.errors import UserError, require
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.model.count import flops_a_token
from nlscale.optim.build import build_optimizer
from nlscale.parallel.apply import PRECISIONS, parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from nlscale.train.peak import peak_bytes, peak_flops

SIZES = ("125m", "350m", "760m", "1.3b")
VARIANTS = ("plain", "hope-attention", "hope")
TARGETS = {("125m", "plain"): 0.45, ("350m", "plain"): 0.45, ("1.3b", "plain"): 0.55}  # MFU on an H100 or H200
OVER_PLAIN = {"hope-attention": 1 / 0.98, "hope": 1.5}  # seconds of a step, over the plain one's
WARM, STEPS = 3, 8


@dataclass(frozen=True)
class Figures:
    """One configuration on one device."""

    tokens_per_second: float
    mfu: float
    peak_bytes: int


def configure(size: str, variant: str, compiled: bool) -> Run:
    """Two micro-batches a step on one GPU."""
    run = read(f"{size}-{variant}", ["use.layout=h200-1", "train.evaluate_rows=0"])
    rows = 2 * run.train.micro_batch
    return replace(run, train=replace(run.train, global_batch=rows, compile="block" if compiled else "none"))


def measured(run: Run) -> Figures:
    """Median of STEPS steps of this rank; the last level does not move in them."""
    world = join(run.parallel, run.cluster, run.train.seed, 0)
    model = parallelize(run, world)
    optimizer = build_optimizer(run, model.leaves, world)
    optimizer.await_in(model.modules)
    rows, seconds = random_rows(run, run.train.global_batch // run.train.micro_batch, world.device), []
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(1, WARM + STEPS + 1):
        began = perf_counter()
        optimizer.step(step, model.forward_backward(rows, True)[2])  # its end reads norms: the host waits for the step
        if step > WARM:
            seconds.append(perf_counter() - began)
    speed = run.train.global_batch * run.data.sequence / median(seconds)
    peak, _ = peak_flops(run.log.peak_flops, PRECISIONS[run.train.precision], world.device)
    return Figures(speed, speed * flops_a_token(run.model, run.levels, run.data.sequence) / peak, peak_bytes())


def rows_of(name: str, found: Figures, target: float | None, plain: Figures | None, limit: float | None) -> list[Row]:
    """MFU against its target, speed against the control's, memory."""
    reached = target is None or found.mfu >= target
    table = [Row(f"{name}: MFU", found.mfu, "of the peak", target, None, f">= {target:g}" if target else "-", reached)]
    if plain is None:
        table.append(Row(f"{name}: tokens/s", found.tokens_per_second, "tokens/s", None, None, "-", True))
    else:
        slower = plain.tokens_per_second / found.tokens_per_second
        ok = limit is None or slower <= limit
        said = f"<= {limit:.3g}x" if limit else "-"
        table.append(
            Row(
                f"{name}: step / plain",
                1 / found.tokens_per_second,
                "s a token",
                1 / plain.tokens_per_second,
                slower,
                said,
                ok,
            )
        )
    return [*table, Row(f"{name}: peak memory", found.peak_bytes / 2**30, "GiB", None, None, "-", True)]


def main(target: str | None) -> int:
    """Prints the table; raises UserError without a GPU."""
    require(gpu_here(), "bench ladder measures a GPU, and there is none here; `nlscale plan` estimates one")
    table: list[Row] = []
    for size in SIZES:
        for compiled in (False, True):
            plain: Figures | None = None
            for variant in VARIANTS:
                name = f"{size}-{variant}{', compiled' if compiled else ''}"
                try:
                    (found,) = ranks(1, measured, configure(size, variant, compiled), timeout=600)
                except (RuntimeError, UserError) as error:
                    print(f"{name}: {str(error).splitlines()[-1]}")
                    continue
                if not compiled:  # a plan is of the eager model: what a compiler keeps, it does not know
                    (expected,) = ranks(1, predicted, configure(size, variant, False), 1, timeout=600)
                    planned = expected[0] / 2**30
                    table.append(within(f"{name}: memory / plan", found.peak_bytes / 2**30, "GiB", planned, 0.05))
                table += rows_of(name, found, TARGETS.get((size, variant)), plain, OVER_PLAIN.get(variant))
                print(f"{name}: {found}", flush=True)  # what stands where the time runs out
                plain = plain or (found if variant == "plain" else None)
    return show(
        f"one {torch.cuda.get_device_name()}, torch {torch.__version__}, median of {STEPS} steps", table, target
    )
