"""What memories cost: HOPE and its kin against a plain torch Transformer of the same shape, in one process, one thread."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from nlscale.bench.plain import PlainTrainer
from nlscale.bench.step import REST, SHAPE, Contestant, Operations, data
from nlscale.bench.table import Row, alternating, at_most, beside, exactly, show
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import World, join
from nlscale.testing import ranks

ROWS, SEQUENCE, ROUNDS = 4, 512, 7
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LENGTHS = (256, 1024, 4096)  # tokens of a row for the growth of HOPE's cost
HOPE = ["use.levels=four", "model.mixer=self_modifying"]
INSIDE = "HOPE, chunks of 128, makers of 256"  # which move inside the row
COMPILED = f"{INSIDE}, by torch.compile"


def inside(*periods: int, shares: Sequence[float] = ()) -> str:
    """Levels that move every so many tokens, of equal width or of these shares."""
    widths = shares or [1 / len(periods)] * len(periods)
    said = [f"{{name: l{p}, period: {p}, unit: token, width: {w}}}" for p, w in zip(periods, widths, strict=True)]
    return f"levels=[{', '.join(said)}]"


def chunks(main: int, makers: int, *more: str) -> list[str]:
    """HOPE whose main memory and makers of keys, values and gates move every so many tokens."""
    name = "model.self_modifying"
    return [*HOPE, f"{name}.chunk={main}", f"{name}.maker_chunk={makers}", *(f"{name}.{each}" for each in more)]


MODELS: dict[str, tuple[list[str], float]] = {  # what differs from the plain Transformer, and the target
    "HOPE, chunks of 128, makers of 512": (chunks(128, 512), 1.40),
    "HOPE, chunks of 256, makers of 512": (chunks(256, 512), 1.40),
    COMPILED: ([*chunks(128, 256), "train.compile=block", "train.activation_budget=0.95"], 1.40),
    INSIDE: (chunks(128, 256), 1.40),
    "HOPE, chunks of 128, makers of 256, computed again": (chunks(128, 256, "recompute=true"), 1.75),
    "Mode I, 1 level": ([inside(128)], 2.0),
    "Mode I, 4 levels": ([inside(64, 128, 256, 512)], 2.5),
    "Titans MAC": (["use.levels=plain", "model.mixer=titans_mac"], 2.5),
}


def configure(overrides: list[str], rows: int, sequence: int) -> Run:
    """A model of the bench's shape."""
    size = [f"data.sequence={sequence}", f"train.micro_batch={rows}", f"train.global_batch={rows}", "cluster.threads=1"]
    return read("demo", [*SHAPE, *REST, *size, *overrides])


def stepper(overrides: list[str], rows: int, sequence: int, world: World | None = None) -> Callable[[], Any]:
    """One step of ours on random rows; without a world it joins one of its own."""
    run = configure(overrides, rows, sequence)
    contestant, batch = Contestant(run, world or join(run.parallel, run.cluster, 0)), data(rows, sequence)
    return lambda: contestant.step(*batch)


def plain_stepper(rows: int, sequence: int) -> Callable[[], Any]:
    """The same of the plain torch Transformer."""
    run, batch = configure(["use.levels=plain"], rows, sequence), data(rows, sequence)
    trainer = PlainTrainer(run.model, sequence, run.optim.lr)
    return lambda: trainer.step(*batch)


def compiled_stepper(rows: int = ROWS, sequence: int = SEQUENCE) -> Callable[[], Any]:
    """The plain Transformer with each layer through torch.compile."""
    run, batch = configure(["use.levels=plain"], rows, sequence), data(rows, sequence)
    trainer = PlainTrainer(run.model, sequence, run.optim.lr)
    trainer.model.layers = torch.nn.ModuleList(torch.compile(layer) for layer in trainer.model.layers)  # type: ignore[misc]
    return lambda: trainer.step(*batch)


def peak(make: Callable[..., Callable[[], Any]], *args: Any) -> tuple[float, float]:
    """Bytes that a model and its optimizer hold after two steps, and what a third takes beside them at most: growth of
    the resident set, and of its high-water mark.

    The allocator gives every tensor of 64 KiB or more pages of its own, so that the mark counts what lives and not the
    holes between.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    before = resident("VmRSS")
    step = make(*args)
    step()
    step()
    held = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    step()
    return float(held - before), float(resident("VmHWM") - held)


def peaks_of(*made: Any, processes: int = 3) -> tuple[float, float]:
    """Medians over processes."""
    held, beside = zip(*(ranks(1, peak, *made, timeout=600)[0] for _ in range(processes)), strict=True)
    return median(held), median(beside)


def resident(field: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def keep_pages() -> None:
    """The allocator keeps its pages: what it gives back after one contestant's step, it must fault in anew at the next."""
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(threshold, 2**30)


def growth(world: World) -> Row:
    """The power of a row's length that HOPE's time grows with, fitted over LENGTHS: 1 is linear, attention tends to 2."""
    said = chunks(64, 64)
    seconds = alternating([stepper(said, 1, length, world) for length in LENGTHS], 5)
    power, _ = np.polyfit(np.log(LENGTHS), np.log(seconds), 1)
    return at_most(f"HOPE, power of the row's length, {LENGTHS[0]} to {LENGTHS[-1]}", float(power), "", 1.0, 1.1)


def reads(world: World) -> Row:
    """Values that the host reads in forward and backward of HOPE, beyond those of attention in its place."""
    counts, (tokens, targets) = [], data(2, SEQUENCE)
    nowhere = torch.zeros_like(tokens, dtype=torch.bool)
    nowhere[:, 100] = True
    for said in ([*MODELS[INSIDE][0], "model.attention=document"], ["use.levels=four"]):
        model = parallelize(configure(said, 2, SEQUENCE), world)
        with Operations() as counted:
            model.forward_backward([(tokens, targets, nowhere)], True)
        counts.append(counted.seen["aten::_local_scalar_dense"])
    return exactly("HOPE, host reads of memory updates", counts[0] - counts[1], "a step", 0)


def main(target: str | None) -> int:
    """Prints the table; 0 if every target is kept."""
    torch.set_num_threads(1)
    plain_peak = sum(peaks_of(plain_stepper, ROWS, SEQUENCE))  # in processes of their own, forked before any thread
    eager = {name: said for name, (said, _) in MODELS.items() if name != COMPILED}
    parts = {name: peaks_of(stepper, said, ROWS, SEQUENCE) for name, said in eager.items()}
    _, taken = peaks_of(stepper, MODELS[COMPILED][0], ROWS, SEQUENCE, processes=1)
    parts[COMPILED] = parts[INSIDE][0], taken  # the same is held, but for what the compiler itself does
    peaks = {name: sum(both) for name, both in parts.items()}
    keep_pages()
    first = configure([], ROWS, SEQUENCE)
    world = join(first.parallel, first.cluster, 0)
    steps = [stepper(said, ROWS, SEQUENCE, world) for said, _ in MODELS.values()]
    plain, by_compiler, *seconds = alternating([plain_stepper(ROWS, SEQUENCE), compiled_stepper(), *steps], ROUNDS)
    table = [
        beside("the plain Transformer, its layers by torch.compile", by_compiler, "s", plain),
        beside(f"{COMPILED}, step / this", seconds[list(MODELS).index(COMPILED)], "s", by_compiler),
    ]
    for (name, (_, limit)), value in zip(MODELS.items(), seconds, strict=True):
        table.append(at_most(f"{name}, step / plain", value, "s", plain, limit))
        table.append(at_most(f"{name}, peak memory / plain", peaks[name] / 2**20, "MB", plain_peak / 2**20, 1.5))
    table += [growth(world), reads(world)]
    title = f"width 256, 4 layers, {SEQUENCE} tokens, batch {ROWS}, one thread, CPU, median of {ROUNDS}"
    return show(title, table, target)
