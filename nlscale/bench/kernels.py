"""Fused kernels against torch's own operators, and against what the device copies and multiplies in the same run.

On a GPU; elsewhere the table of machine code that was compiled ahead of time, and every speed is "not measured".
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch

from nlscale.bench.attention_kernels import attention
from nlscale.bench.memory_kernels import Shape, between_products, matrix_memories, mlp_memories, walks
from nlscale.bench.table import Row, Timer, alternating, by_clock, show, write
from nlscale.bench.weight_kernels import continuum, levels, matrices, orthogonalisation, symmetric

ROUNDS = 30
FLUSHES, MOST_FLUSHES = 12, 400  # before a call
AN_ELEMENT = 110  # bytes of all contestants of level_step, a weight


def on_gpu(contestants: Sequence[Callable[[], object]]) -> list[float]:
    """Times between events on the stream; flushes of the cache before each call are long enough to hide its launches."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    launches: dict[Callable[[], object], float] = {}  # the host's seconds in a call, at best so far

    def timed(run: Callable[[], object], flushes: int) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            flush.zero_()
        began.record()
        launches[run] = min(by_clock(run), launches.get(run, inf))
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3

    one = min(timed(flush.zero_, 3) for _ in range(3))
    return alternating(contestants, ROUNDS, 3, lambda run: timed(run, hiding(launches.get(run, inf), one)))


def hiding(launches: float, flush: float) -> int:
    """How many flushes of so many seconds hide so many seconds of launches: with a margin, and within a stream's queue."""
    return int(max(FLUSHES, min(MOST_FLUSHES, 1.5 * launches / flush)))


def on_cpu(contestants: Sequence[Callable[[], object]]) -> list[float]:
    """On the host's clock, to try the table out."""
    return alternating(contestants, 3, 0)


def products(side: int, device: str, timer: Timer) -> float:
    """Multiplications a second of torch's product of two square matrices: what a device gives at most."""
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    (seconds,) = timer([lambda: square @ square])
    return side**3 / seconds


def elements_here() -> int:
    """Weights in the table of level_step: 2^30, or a lower power of two that the GPU has the memory for."""
    free, _ = torch.cuda.mem_get_info()
    return 2 ** min(30, (free // AN_ELEMENT).bit_length() - 1)


def tables(elements: int, side: int, device: str, timer: Timer) -> Iterator[list[Row]]:
    """All of them, an operator's at a time; sizes of memories follow `side`."""
    fastest = products(2 * side, device, timer)
    yield levels(elements, device, timer)
    yield continuum(elements // 4, device, timer)
    yield matrices(elements // 4, device, timer)
    for each in (side // 2, side):
        yield symmetric(each, device, timer, fastest)
        yield orthogonalisation(each, 1, device, timer, fastest)
        yield orthogonalisation(each, 4, device, timer, fastest)
    for rule in ("delta", "dgd_frozen"):
        yield matrix_memories(Shape(4, 16, side, 128), device, timer, fastest, rule)
    yield walks(Shape(4, 16, side // 8, 64), device, timer)
    yield attention(Shape(4, 16, side, 128), device, timer)
    yield between_products(elements // 4, device, timer)
    for chunk in (side // 16, side // 4, side // 2):
        yield mlp_memories(chunk, side // 4, device, timer, fastest)


def main(target: str | None) -> int:
    """Prints the table; 0 if every target is kept."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # of all contestants, as in runs of bfloat16
        title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, median of {ROUNDS}, cache flushed between"
        found: list[Row] = []
        for rows in tables(elements_here(), 4096, "cuda", on_gpu):
            found += rows
            for row in rows:
                print(f"{row.name}: {row.value} {row.unit}, ratio {row.ratio}", flush=True)  # should it be cut short
            if target:
                write(found, target)
        return show(title, found, target)
    print("Speeds: not measured, there is no NVIDIA GPU here. Machine code, compiled ahead of time:", flush=True)
    return machine_code(target)


def machine_code(target: str | None) -> int:
    """Has every kernel compiled ahead of time, and writes the registers of each; 0 if all keep their budgets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "built.json")
        command = [sys.executable, "-m", "nlscale_kernels.aot", "--json", str(file)]
        code = subprocess.run(command, env=environment, check=False).returncode
        built = json.loads(file.read_text()) if file.is_file() else []
    if target:
        write([needed(**each) for each in built], target)
    return code


def needed(
    operator: str,
    kernel: str,
    config: str,
    arch: int,
    registers: int,
    spills: int,
    shared: int,
    faults: list[str],
    **_: Any,
) -> Row:
    """One kernel's machine code as a row: `value` is its registers."""
    unit = f"registers; {spills} bytes spilled, {shared} of shared memory{''.join(f'; {each}' for each in faults)}"
    return Row(f"{operator} {kernel} {config} sm_{arch}", registers, unit, None, None, "its budget", not faults)
