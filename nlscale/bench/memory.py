"""Predicted against measured: resident memory of a step in which every level moves, on one rank and on two, on the CPU.

What a process holds when it has joined its world (Python, libraries, groups) is taken off. Memory that is freed goes back
to the system at once, as an allocator of a GPU's memory would use it again.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from nlscale.bench.rows import random_rows
from nlscale.bench.table import Row, show, within
from nlscale.config.errors import require
from nlscale.config.read import dump, read
from nlscale.config.run import Run
from nlscale.optim.build import build_optimizer
from nlscale.parallel.apply import parallelize
from nlscale.plan.simulate import stages
from nlscale.runtime.quiet import quiet
from nlscale.runtime.world import World, join
from nlscale.testing import ranks

SIZES = {  # width, layers, heads, hidden
    "10M": (256, 8, 8, 768),
    "40M": (512, 10, 8, 1408),
    "125M": (768, 12, 12, 2048),
}
REST = ("data.sequence=512", "train.precision=fp32", "model.attention=causal", "train.evaluate_rows=0")
TOLERANCE = 0.05
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of mallopt(3)


def configure(size: str, levels: str, count: int, *overrides: str) -> Run:
    """A size of the bench on `count` ranks, two rows each."""
    width, layers, heads, hidden = SIZES[size]
    shape = [f"model.width={width}", f"model.layers={layers}", f"model.heads={heads}", f"model.kv_heads={heads}"]
    rows = [f"train.global_batch={4 * count}", "train.micro_batch=2", "parallel.tensor=1", "model.vocabulary=8192"]
    return read("demo", [f"use.levels={levels}", *shape, f"model.hidden={hidden}", *rows, *REST, *overrides])


def predicted(run: Run, count: int) -> list[int]:
    """Bytes of each pipeline rank."""
    return [stage.resident for stage in stages(run, count)]


def measured(run: Run) -> tuple[int, int]:
    """(pipeline rank, peak bytes) of this rank, above what it held when it had joined."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(M_ARENA_MAX, 1)
    world = join(run.parallel, run.cluster, 0, run.optim.node)
    smaller = replace(run.model, width=64, heads=8, kv_heads=8, hidden=64, layers=run.parallel.stages)
    stepped(replace(run, model=smaller), world)  # what libraries load on their first call
    gc.collect()
    before = resident("VmRSS")
    stepped(run, world)
    return world.pipeline_rank, resident("VmHWM") - before


def stepped(run: Run, world: World) -> None:
    """Builds a run and makes two steps, in the second of which every level moves; the peak is of that one."""
    model = parallelize(run, world)
    optimizer = build_optimizer(run, model.leaves, world, 1000)
    optimizer.await_in(model.modules)
    batches = random_rows(run, run.train.global_batch // world.replicas // run.train.micro_batch, world.device)
    every = max(level.steps for level in run.levels)
    for step in (1, max(2, every)):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        optimizer.step(step, model.forward_backward(batches, True)[2].long())


def resident(word: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{word}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {word}")


def compared(name: str, run: Run, count: int) -> list[Row]:
    """A row a pipeline rank. Ranks are born of a process of their own: this one's freed memory would be used first there,
    and would not be counted.
    """
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        config, out = Path(folder, "config.yaml"), Path(folder, "out.json")
        config.write_text(dump(run))
        words = [sys.executable, "-m", "nlscale.bench.memory", str(config), str(count), str(out)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=900)
        require(done.returncode == 0, f"{name}: {(done.stderr.splitlines() or ['no word'])[-1]}")
        expected, found = json.loads(out.read_text())
    return [
        within(
            f"{name}{f', stage {place}' if len(found) > 1 else ''}",
            found[place] / 2**20,
            "MiB",
            expected[place] / 2**20,
            TOLERANCE,
        )
        for place in range(len(found))
    ]


def both(config: str, count: int, out: str) -> None:
    """Predicted and measured bytes of each pipeline rank, as JSON."""
    quiet()
    run = read(config)
    (expected,) = ranks(1, predicted, run, count, timeout=300)
    found = [0] * run.parallel.pipeline
    for place, peak in ranks(count, measured, run, timeout=600):
        found[place] = max(peak, found[place])
    Path(out).write_text(json.dumps([expected, found]))


def main(target: str | None) -> int:
    """Prints the table; 0 if every prediction is within the tolerance. `bench ladder` compares on a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    table = []
    for size in SIZES:
        for levels, label in (("plain", "plain"), ("four", "four levels")):
            for count in (1, 2):
                run = configure(size, levels, count)
                table += compared(f"{size} {label}, {count} rank{'s' if count > 1 else ''}", run, count)
    return show("peak resident memory of a step: measured, baseline: predicted", table, target)


if __name__ == "__main__":
    both(sys.argv[1], int(sys.argv[2]), sys.argv[3])
