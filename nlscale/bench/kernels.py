"""Fused kernels against torch's own operators, and against what the device copies and multiplies in the same run.

On a GPU; elsewhere the table of machine code that was compiled ahead of time, and every speed is "not measured".
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from nlscale_kernels import level_step, newton_schulz
from nlscale_kernels.newton_schulz import reference
from torch import Tensor

from nlscale.bench.memory_kernels import Shape, between_products, matrix_memories, mlp_memories, walks
from nlscale.bench.table import Row, Timer, alternating, at_least, show, write

ROUNDS = 30
PERIODS = (1, 4, 16, 64)
HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def on_gpu(contestants: Sequence[Callable[[], object]]) -> list[float]:
    """Times between events on the stream; flushes of the cache before each call are long enough to hide its launch."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")

    def seconds(run: Callable[[], object]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(12):
            flush.zero_()
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3

    return alternating(contestants, ROUNDS, 3, seconds)


def on_cpu(contestants: Sequence[Callable[[], object]]) -> list[float]:
    """On the host's clock, to try the table out."""
    return alternating(contestants, 3, 0)


def levels(elements: int, device: str, timer: Timer) -> list[Row]:
    """level_step on a shard of a bfloat16 model: bytes a second of those of a copy; against torch's two optimizers."""
    master = torch.randn(elements, device=device)
    gradient, copy = torch.randn_like(master), master.bfloat16()
    narrow = gradient.bfloat16()
    first, second = torch.zeros_like(master), torch.zeros_like(master)
    rows = level_step.table([level_step.AdamW.at(1, 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5)], master)

    def fused() -> None:
        level_step.adamw(master, gradient, first, second, copy, rows)

    def fused_narrow() -> None:
        level_step.adamw(master, narrow, first, second, copy, rows)

    def theirs(**how: bool) -> Callable[[], None]:
        parameter = torch.nn.Parameter(torch.randn(elements, device=device))
        optimizer = torch.optim.AdamW([parameter], **HYPER, **how)  # type: ignore[arg-type]

        def step() -> None:
            parameter.grad = gradient.mul_(0.5)
            optimizer.step()
            copy.copy_(parameter.detach())

        return step

    def written_out() -> None:
        scaled = gradient * 0.5
        first.lerp_(scaled, 0.1)
        second.mul_(0.95).addcmul_(scaled, scaled, value=0.05)
        master.mul_(1 - 1e-4).addcdiv_(first, second.sqrt().add_(1e-8), value=-1e-3)
        copy.copy_(master)

    compiled = torch.compile(written_out) if device == "cuda" else written_out
    resting = level_step.table([level_step.AdamW.at(1, 1e-3, (0.9, 0.95), 1e-8, 0.1), level_step.AdamW.rest()], master)
    quarter = (torch.arange(-(-elements // level_step.BLOCK), device=device) % 4 > 0).int()

    def one_of_four() -> None:
        level_step.adamw(master, gradient, first, second, copy, resting, quarter)

    source, target = torch.empty_like(master), torch.empty_like(master)
    others = [theirs(foreach=True), theirs(fused=True), compiled]
    runs = [fused, fused_narrow, *others, one_of_four, lambda: target.copy_(source)]
    own, own_narrow, foreach, fused_torch, by_compiler, one, copied = timer(runs)
    copying = 8 * elements / copied
    rates = {"float32 gradients": 30 * elements / own, "bfloat16 gradients": 28 * elements / own_narrow}
    return [
        *(
            at_least(f"level_step, {name}, bytes a second / a copy's", rate / 1e12, "TB/s", copying / 1e12, 0.9)
            for name, rate in rates.items()
        ),
        at_least("level_step, foreach AdamW, scale, cast / own", foreach, "s", own, 3.0),
        at_least("level_step, fused AdamW, scale, cast / own", fused_torch, "s", own, 1.35),
        at_least("level_step, written out and compiled by torch.compile / own", by_compiler, "s", own, 0.97),
        at_least("level_step, all levels / one of four due", own, "s", one, 3.0),
    ]


def continuum(elements: int, device: str, timer: Timer) -> list[Row]:
    """Four levels of equal size that move every 1, 4, 16 and 64 steps: the mean step of one launch, whose table says which
    are due, and of torch's foreach optimizers of those that are.
    """
    share = elements // len(PERIODS)
    parameters = [torch.nn.Parameter(torch.randn(share, device=device)) for _ in PERIODS]
    copies = [each.detach().bfloat16() for each in parameters]
    optimizers = [torch.optim.AdamW([each], **HYPER, foreach=True) for each in parameters]  # type: ignore[arg-type]
    master = torch.randn(len(PERIODS) * share, device=device)
    state = [torch.randn_like(master), torch.zeros_like(master), torch.zeros_like(master), master.bfloat16()]
    rows = level_step.table(
        [level_step.AdamW.at(1, 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5), level_step.AdamW.rest()], master
    )
    place = torch.arange(-(-len(master) // level_step.BLOCK), device=device) * level_step.BLOCK // share

    def theirs(due: int) -> Callable[[], None]:
        def step() -> None:
            for parameter, copy, optimizer in zip(parameters[:due], copies[:due], optimizers[:due], strict=True):
                parameter.grad = copy.float().mul_(0.5)
                optimizer.step()
                copy.copy_(parameter.detach())

        return step

    def ours(due: int) -> Callable[[], object]:
        blocks = (place >= due).int()
        return lambda: level_step.adamw(master, *state, rows, blocks)

    counts = range(1, len(PERIODS) + 1)
    times = timer([form(due) for form in (ours, theirs) for due in counts])
    own, foreach = (mean_step(times[start : start + len(PERIODS)]) for start in (0, len(PERIODS)))
    periods = "/".join(map(str, PERIODS))
    return [at_least(f"level_step, levels of {periods} steps, foreach AdamW / own, mean", foreach, "s", own, 2.2)]


def mean_step(seconds: Sequence[float]) -> float:
    """Of steps in which the first 1, 2, ... levels are due."""
    last = PERIODS[-1]
    due = [sum(step % period == 0 for period in PERIODS) for step in range(1, last + 1)]
    return sum(seconds[count - 1] for count in due) / last


def orthogonalisation(side: int, device: str, timer: Timer) -> list[Row]:
    """Symmetric products, and both forms of Newton-Schulz against plain products."""
    narrow = torch.bfloat16 if device == "cuda" else torch.float32
    square = torch.randn(1, side, side, device=device, dtype=narrow) / side
    wide = torch.randn(1, side, 4 * side, device=device) / side

    def plain(x: Tensor) -> Callable[[], Tensor]:
        return lambda: reference.direct(x.to(narrow), 5)

    own, whole, direct, dense, gram, dense_wide = timer(
        [
            lambda: newton_schulz.symmetric_product(square, square),
            lambda: square @ square.mT,
            lambda: reference.direct(square, 5, newton_schulz.symmetric_product),
            plain(square),
            lambda: newton_schulz.orthogonal(wide, 5),
            plain(wide),
        ]
    )
    rate = side**3 / own / 1e12
    return [
        at_least(f"X X^T {side}, torch / own ({rate:.0f}T multiplications/s)", whole, "s", own, 1.5),
        at_least(f"Newton-Schulz {side} x {side}, torch / own", dense, "s", direct, 1.25),
        at_least(f"Newton-Schulz {side} x {4 * side}, torch / Gram form", dense_wide, "s", gram, 1.7),
    ]


def products(side: int, device: str, timer: Timer) -> float:
    """Multiplications a second of torch's product of two square matrices: what a device gives at most."""
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    (seconds,) = timer([lambda: square @ square])
    return side**3 / seconds


def tables(elements: int, side: int, device: str, timer: Timer) -> Iterator[list[Row]]:
    """All of them, an operator's at a time; sizes of memories follow `side`."""
    yield levels(elements, device, timer)
    yield continuum(elements, device, timer)
    yield orthogonalisation(side, device, timer)
    for rule in ("delta", "dgd_frozen"):
        yield matrix_memories(Shape(4, 16, side, 128), device, timer, rule)
    yield walks(Shape(4, 16, side // 8, 64), device, timer)
    yield between_products(elements, device, timer)
    fastest = products(2 * side, device, timer)
    for chunk in (side // 16, side // 4, side // 2):
        yield mlp_memories(chunk, side // 4, device, timer, fastest)


def main(target: str | None) -> int:
    """Prints the table; 0 if every target is kept."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # of all contestants, as in runs of bfloat16
        title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, median of {ROUNDS}, cache flushed between"
        found: list[Row] = []
        for rows in tables(2**28, 4096, "cuda", on_gpu):
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
