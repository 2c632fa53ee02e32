"""A bench's table: rows of ratios against a baseline of the same run, with what they were measured on."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import ParamSpec, TypeVar

import torch

from nlscale.testing import ranks

Timer = Callable[[Sequence[Callable[[], object]]], list[float]]  # median seconds of each, called in turn
P = ParamSpec("P")
T = TypeVar("T")
PACKAGES = ("torch", "megatron-core", "deepspeed", "mosaicml-streaming", "triton")


@dataclass(frozen=True)
class Row:
    """One figure. `ok` says whether `ratio` (or `value` where there is no baseline) keeps the target."""

    name: str
    value: float | None  # None: it failed
    unit: str
    baseline: float | None
    ratio: float | None
    target: str
    ok: bool


def at_most(name: str, value: float, unit: str, baseline: float, limit: float) -> Row:
    """value / baseline <= limit."""
    ratio = value / baseline
    return Row(name, value, unit, baseline, ratio, f"<= {limit:g}x", ratio <= limit)


def at_least(name: str, value: float, unit: str, baseline: float, limit: float) -> Row:
    """value / baseline >= limit."""
    ratio = value / baseline
    return Row(name, value, unit, baseline, ratio, f">= {limit:g}x", ratio >= limit)


def within(name: str, value: float, unit: str, baseline: float, tolerance: float) -> Row:
    """|value / baseline - 1| <= tolerance."""
    ratio = value / baseline
    return Row(name, value, unit, baseline, ratio, f"+- {tolerance:.1%}", abs(ratio - 1) <= tolerance)


def beside(name: str, value: float, unit: str, baseline: float) -> Row:
    """value / baseline, of which nothing is promised."""
    return Row(name, value, unit, baseline, value / baseline, "-", True)


def exactly(name: str, value: float, unit: str, wanted: float) -> Row:
    """value = wanted."""
    return Row(name, value, unit, None, None, f"= {wanted:g}", value == wanted)


def gpu_here() -> bool:
    """Whether there is a GPU, told by its driver: asking CUDA itself would spoil processes that are forked after."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    return torch.cuda.is_available()


@cache
def gpu_name() -> str:
    """Of the first GPU, asked in a process of its own for as long as CUDA is not in use in this one, as in `gpu_here`."""
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    (name,) = ranks(1, torch.cuda.get_device_name)
    return str(name)


def by_clock(run: Callable[[], object]) -> float:
    """Seconds of one call on the host's clock."""
    began = perf_counter()
    run()
    return perf_counter() - began


def alternating(
    contestants: Sequence[Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    seconds: Callable[[Callable[[], object]], float] = by_clock,
) -> list[float]:
    """Median seconds of each contestant, called in turn, so that a noisy machine disturbs all alike."""
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(warmup + rounds):
        for run, seen in zip(contestants, times, strict=True):
            taken = seconds(run)
            if turn >= warmup:
                seen.append(taken)
    return [median(seen) for seen in times]


def by_compiler(form: Callable[P, T], device: str) -> Callable[P, T]:
    """Compiled on a GPU, for the shapes it meets and no others, whatever was timed before."""
    return torch.compile(form, dynamic=False) if device == "cuda" else form


def show(title: str, rows: Sequence[Row], target: str | None) -> int:
    """Prints the table, writes it as JSON where asked; gives 0 if every target is kept, else 1."""
    print(title)
    wide = max([48, *(len(row.name) for row in rows)])
    print(f"{'':{wide}s} {'value':>12s} {'baseline':>12s} {'ratio':>8s} {'target':>10s}")
    for row in rows:
        value = f"{row.value:12.5g}" if row.value is not None else f"{'-':>12s}"
        baseline = f"{row.baseline:12.5g}" if row.baseline is not None else " " * 12
        ratio = f"{row.ratio:8.3f}" if row.ratio is not None else " " * 8
        mark = "MISSED" if not row.ok else "ok" if row.target != "-" else ""
        print(f"{row.name:{wide}s} {value} {baseline} {ratio} {row.target:>10s}  {mark:6s}  ({row.unit})")
    if target:
        write(rows, target)
    return 0 if all(row.ok for row in rows) else 1


def versions() -> dict[str, str]:
    """Of the packages that figures depend on."""
    installed = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    return {name: installed.get(name, "not installed") for name in PACKAGES}


def write(rows: Sequence[Row], target: str) -> None:
    """The rows as JSON, with the machine, the date and the versions of what ran."""
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "gpu": gpu_name() if gpu_here() else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    record = {"rows": [asdict(row) for row in rows], "machine": machine, "versions": versions()}
    Path(target).write_text(json.dumps(record, indent=1) + "\n")
