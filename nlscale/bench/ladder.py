"""Tokens a second, MFU and peak memory of the ladder's small sizes on one GPU, with torch.compile and without.

Each size as the control, HOPE-Attention and HOPE, one process each, so that what one leaves on the GPU is not another's;
random rows of 4,096 tokens, the micro-batch of the shipped layout for one GPU.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import perf_counter

import torch

from nlscale.bench.memory import predicted
from nlscale.bench.rows import random_rows
from nlscale.bench.table import Row, gpu_here, gpu_name, show, versions, within, write
from nlscale.config.errors import UserError, require
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.model.count import flops_a_token
from nlscale.optim.build import build_optimizer
from nlscale.parallel.apply import PRECISIONS, parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from nlscale.train.peak import peak_bytes, peak_flops

SIZES = ("1.3b", "125m", "350m", "760m")  # those with targets first: time may run out
VARIANTS = ("plain", "hope-attention", "hope")
SOFTWARE = ("torch", "megatron-core", "triton")
TARGETS = {("125m", "plain"): 0.45, ("350m", "plain"): 0.45, ("1.3b", "plain"): 0.55}  # MFU on an H100 or H200
OVER_PLAIN = {"hope-attention": 1 / 0.98, "hope": 1.5}  # seconds of a step, over the plain one's
WARM, STEPS = 4, 16  # every residue of levels that move every 1, 4 and 16 steps; 64 and 512 do not move


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
    """Means of STEPS steps of this rank."""
    world = join(run.parallel, run.cluster, run.train.seed, 0)
    model = parallelize(run, world)
    optimizer = build_optimizer(run, model.leaves, world)
    optimizer.await_in(model.modules)
    rows, began = random_rows(run, run.train.global_batch // run.train.micro_batch, world.device), 0.0
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(1, WARM + STEPS + 1):
        optimizer.step(step, model.forward_backward(rows, True)[2])  # its end reads norms: the host waits for the step
        began = perf_counter() if step == WARM else began
    speed = STEPS * run.train.global_batch * run.data.sequence / (perf_counter() - began)
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


def tried(size: str, variant: str, compiled: bool, plain: Figures | None) -> tuple[Figures | None, list[Row]]:
    """One configuration's figures and rows; a row that misses where it cannot run."""
    name = f"{size}-{variant}{', compiled' if compiled else ''}"
    try:
        run = configure(size, variant, compiled)
        (found,) = ranks(1, measured, run, timeout=600)
    except (RuntimeError, UserError) as error:
        print(f"{name}: {str(error).splitlines()[-1]}", flush=True)
        return None, [Row(f"{name}: failed", None, "-", None, None, "runs", False)]
    print(f"{name}: {found}", flush=True)
    rows = rows_of(name, found, TARGETS.get((size, variant)), plain, OVER_PLAIN.get(variant))
    if not compiled:  # a plan is of the eager model: what a compiler keeps, it does not know
        planned = ranks(1, predicted, run, 1, timeout=600)[0][0]
        rows.append(within(f"{name}: memory / plan", found.peak_bytes / 2**30, "GiB", planned / 2**30, 0.05))
    return found, rows


def readme(found: dict[tuple[str, str, bool], Figures | None], device: str) -> list[str]:
    """The README's table: a line a size and variant."""
    lines = ["| one GPU, bf16 | tokens/s, MFU, peak GiB | with torch.compile | measured on |", "|---|---|---|---|"]
    for size, variant in dict.fromkeys(key[:2] for key in found):
        each = [found.get((size, variant, compiled)) for compiled in (False, True)]
        said = [
            f"{one.tokens_per_second:,.0f}, {one.mfu:.1%}, {one.peak_bytes / 2**30:.1f}" if one else "not measured"
            for one in each
        ]
        lines.append(f"| {size}-{variant} | {' | '.join(said)} | {device if any(each) else '-'} |")
    return lines


def main(target: str | None) -> int:
    """Prints the table, written after each configuration; raises UserError without a GPU."""
    require(gpu_here(), "bench ladder measures a GPU, and there is none here; `nlscale plan` estimates one")
    table: list[Row] = []
    found: dict[tuple[str, str, bool], Figures | None] = {}
    for size in SIZES:
        for compiled in (False, True):
            for variant in VARIANTS:
                plain = found.get((size, "plain", compiled))
                found[size, variant, compiled], rows = tried(size, variant, compiled, plain)
                table += rows
                if target:
                    write(table, target)  # what stands where the time runs out
    software = ", ".join(f"{name} {version}" for name, version in versions().items() if name in SOFTWARE)
    device = f"{gpu_name()}, {software}, {datetime.now(UTC):%Y-%m-%d}"
    print("\n".join(readme(found, device)))
    return show(f"{device}, mean of {STEPS} steps", table, target)
