"""Compilation ahead of time, without a GPU: what the machine code of every kernel and config needs.

    python -m nlscale_kernels.aot [--arch 80 90] [--launched] [--json FILE] [OPERATOR ...]

prints registers, spilled bytes, shared memory and tensor-core instructions of each kernel x config x architecture, and ends
with 1 where one breaks its budget; --launched: of every way in which operators launch them (launched.py). It runs in
a process of its own: not under Triton's interpreter.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from nlscale_kernels import machine_code
from nlscale_kernels.machine_code import Code
from nlscale_kernels.turned import turned_sums

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory that a block may use
PRODUCTS = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA")}  # instructions of tensor cores
COLUMNS = 512  # of tensor memory on sm_100: a kernel that asks for more compiles to a stub
OPERATORS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py")))
TOGETHER = 8  # kernels whose code is read at once


@dataclass(frozen=True)
class Built:
    """One kernel's machine code."""

    operator: str
    kernel: str
    config: str
    arch: int
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    instructions: int
    products: dict[str, int]  # tensor-core instructions by name
    seconds: float
    faults: list[str]  # how it breaks its budget


def signature(launch: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and alignment of a launch's arguments, as Triton would see them."""
    import torch

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int8: "i8"}
    types: dict[str, str] = {}
    constants = dict(launch.constants)
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        given = launch.arguments[place] if place < len(launch.arguments) else None
        if name in constants or given is None or (isinstance(given, int) and given == 1):
            constants.setdefault(name, given)
            types[name] = "constexpr"
        elif isinstance(given, torch.dtype):
            types[name], aligned[(place,)] = f"*{names[given]}", [["tt.divisibility", 16]]
        elif isinstance(given, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if given < 2**31 else "i64"
            if given % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
    return types, constants, aligned


def compiled(launch: Any, config: Any, arch: int) -> Code:
    """The kernel for an architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, aligned = signature(launch)
    source = ASTSource(launch.kernel, types, {**constants, **config.tiles}, aligned)
    return machine_code.compiled(
        source, GPUTarget("cuda", arch, 32), {"num_warps": config.warps, "num_stages": config.stages}
    )


def build(operator: str, ways: Sequence[tuple[Any, Any]], arch: int) -> list[Built]:
    """Compiles launches, each by a config, and holds them against their budgets."""
    codes, seconds = [], []
    for launch, config in ways:
        began = time.monotonic()
        codes.append(compiled(launch, config, arch))
        seconds.append(round(time.monotonic() - began, 2))
    counts = machine_code.instructions([code.kernel for code in codes])
    return [
        held(operator, *way, arch, code, count, took)
        for way, code, count, took in zip(ways, codes, counts, seconds, strict=True)
    ]


def held(operator: str, launch: Any, config: Any, arch: int, code: Code, counts: Counter[str], seconds: float) -> Built:
    """One kernel against its budget."""
    kernel, spills = code
    registers, shared = machine_code.registers(kernel), kernel.metadata.shared
    products = {name: counts[name] for name in PRODUCTS[arch] if name in counts}
    columns = getattr(kernel.metadata, "tmem_size", 0) or 0
    turned = turned_sums(kernel.asm["ttgir"])
    faults = [
        fault
        for fault, holds in (
            (f"{registers} registers, at most {launch.registers}", registers <= launch.registers),
            (f"{spills} bytes spilled, at most {launch.spills}", spills <= launch.spills),
            (f"{shared} bytes of shared memory, at most {SHARED[arch]}", shared <= SHARED[arch]),
            (f"{columns} columns of tensor memory, at most {COLUMNS}", columns <= COLUMNS),
            ("no tensor-core instruction", bool(products) or not launch.product),
            (f"products of transposed sums: {', '.join(turned)} (turned.py)", not turned or launch.turned),
            ("no loads and stores of 16 bytes", bool(counts["LDG.128"] and counts["STG.128"]) or not launch.stream),
        )
        if not holds
    ]
    said = " ".join(f"{name}={size}" for name, size in config.tiles.items())
    shape = f"{said} warps={config.warps} stages={config.stages}".strip()
    total = sum(count for name, count in counts.items() if "." not in name)
    return Built(operator, launch.name, shape, arch, registers, spills, shared, total, products, seconds, faults)


@cache
def launches_of(operator: str, arch: int, launched: bool) -> Sequence[Any]:
    """What an operator's kernels are launched as: the ways that matter for speed, or all."""
    found: Sequence[Any] = (
        import_module("nlscale_kernels.launched").launches_of(operator, arch)
        if launched
        else import_module(f"nlscale_kernels.{operator}.triton").launches()
    )
    return found


class Batch(NamedTuple):
    """Some of an operator's kernels and configs, for one architecture: places in the list of its launches and configs."""

    operator: str
    arch: int
    launched: bool
    places: list[tuple[int, int]]


def build_batch(batch: Batch) -> list[Built]:
    """One of `batches`."""
    launches = launches_of(batch.operator, batch.arch, batch.launched)
    return build(batch.operator, [(launches[i], launches[i].configs[j]) for i, j in batch.places], batch.arch)


def batches(operators: Sequence[str], archs: Sequence[int], launched: bool) -> Iterator[Batch]:
    """Every kernel and config of these operators on these architectures."""
    for operator in operators:
        for arch in archs:
            launches = launches_of(operator, arch, launched)
            places = [(i, j) for i, each in enumerate(launches) for j, c in enumerate(each.configs) if c.least <= arch]
            yield from (
                Batch(operator, arch, launched, places[start : start + TOGETHER])
                for start in range(0, len(places), TOGETHER)
            )


def all_of(operators: Sequence[str], archs: Sequence[int], launched: bool) -> Iterator[Built]:
    """Every kernel and config of these operators, one process a core."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for found in pool.map(build_batch, batches(operators, archs, launched)):
            yield from found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m nlscale_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("operators", nargs="*", default=OPERATORS, metavar="OPERATOR")
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90], choices=sorted(SHARED))
    parser.add_argument("--launched", action="store_true", help="every way in which operators launch their kernels")
    parser.add_argument("--json", help="write what was found to this file")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    unknown = set(given.operators) - set(OPERATORS)
    if unknown:
        parser.error(f"no operator {', '.join(sorted(unknown))}; choose of {', '.join(OPERATORS)}")
    found = []
    for built in all_of(given.operators, given.arch, given.launched):
        found.append(built)
        products = " ".join(f"{name} {count}" for name, count in built.products.items())
        print(
            f"sm_{built.arch:<4}{built.operator:15}{built.kernel:38}{built.config:38} {built.registers:3} registers "
            f"{built.spills:4} spilled {built.shared // 1024:4} KiB {built.seconds:5.1f} s  {products}"
            + "".join(f"\n      over budget: {fault}" for fault in built.faults),
            flush=True,
        )
    if given.json:
        Path(given.json).write_text(json.dumps([asdict(built) for built in found], indent=1))
    return int(any(built.faults for built in found))


if __name__ == "__main__":
    sys.exit(main())
