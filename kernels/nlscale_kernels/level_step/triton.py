"""The functions of reference.py as Triton kernels: each element is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlscale_kernels.level_step.table import BLOCK
from nlscale_kernels.triton_build import Config, Launch

DEFAULT = Config({}, warps=4, stages=1)


@triton.jit
def _row(table, blocks, block, COLUMNS: tl.constexpr):
    """Where this block's row of the table begins."""
    if blocks is None:
        return table
    else:
        return table + tl.load(blocks + block) * COLUMNS


@triton.jit
def adamw_kernel(
    master, gradient, first, second, copy, told, table, blocks, count, CLEAR: tl.constexpr, BLOCK: tl.constexpr
):
    """28 bytes an element with a bfloat16 gradient and copy."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    row = _row(table, blocks, block, 9)
    if tl.load(row) == 0.0:
        tl.store(told + block, 0.0)
    else:
        g = tl.load(gradient + at, mask=here, other=0.0).to(tl.float32) * tl.load(row + 1)
        w = tl.load(master + at, mask=here, other=0.0)
        m = tl.load(first + at, mask=here, other=0.0)
        v = tl.load(second + at, mask=here, other=0.0)
        rate = tl.load(row + 2)
        m += (1.0 - tl.load(row + 5)) * (g - m)
        beta2 = tl.load(row + 6)
        v = beta2 * v + (1.0 - beta2) * g * g
        root = tl.sqrt(v) * tl.load(row + 8) + tl.load(row + 4)
        change = -rate * tl.load(row + 3) * w - rate * tl.load(row + 7) * (m / root)
        w += change
        tl.store(master + at, w, mask=here)
        tl.store(first + at, m, mask=here)
        tl.store(second + at, v, mask=here)
        if copy is not None:
            tl.store(copy + at, w.to(copy.dtype.element_ty), mask=here)
        if CLEAR:
            tl.store(gradient + at, tl.zeros_like(g).to(gradient.dtype.element_ty), mask=here)
        tl.store(told + block, tl.sum(change * change, 0))


@triton.jit
def momenta_kernel(gradient, momentum, total, slow, table, blocks, count, CLEAR: tl.constexpr, BLOCK: tl.constexpr):
    """A momentum of gradients, and the slow one that moves less often."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    row = _row(table, blocks, block, 7)
    if tl.load(row) != 0.0:
        g = tl.load(gradient + at, mask=here, other=0.0).to(tl.float32) * tl.load(row + 1)
        m = tl.load(momentum + at, mask=here, other=0.0)
        tl.store(momentum + at, tl.load(row + 2) * m + tl.load(row + 3) * g, mask=here)
        if total is not None:
            s = tl.load(total + at, mask=here, other=0.0) + g
            if tl.load(row + 4) != 0.0:
                old = tl.load(slow + at, mask=here, other=0.0)
                tl.store(slow + at, tl.load(row + 5) * old + tl.load(row + 6) * s, mask=here)
                s = tl.zeros_like(s)
            tl.store(total + at, s, mask=here)
        if CLEAR:
            tl.store(gradient + at, tl.zeros_like(g).to(gradient.dtype.element_ty), mask=here)


@triton.jit
def descend_kernel(master, direction, copy, told, table, blocks, count, BLOCK: tl.constexpr):
    """The weight follows a direction that is there."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    row = _row(table, blocks, block, 3)
    if tl.load(row) == 0.0:
        tl.store(told + block, 0.0)
    else:
        w = tl.load(master + at, mask=here, other=0.0)
        d = tl.load(direction + at, mask=here, other=0.0).to(tl.float32)
        rate = tl.load(row + 1)
        change = -rate * tl.load(row + 2) * w - rate * d
        w += change
        tl.store(master + at, w, mask=here)
        if copy is not None:
            tl.store(copy + at, w.to(copy.dtype.element_ty), mask=here)
        tl.store(told + block, tl.sum(change * change, 0))


def _grid(like: Tensor) -> tuple[int]:
    return (triton.cdiv(like.numel(), BLOCK),)


def adamw(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    table: Tensor,
    blocks: Tensor | None = None,
    clear: bool = False,
) -> Tensor:
    """As reference.adamw, for float32 masters."""
    grid = _grid(master)
    told = torch.empty(grid, dtype=torch.float32, device=master.device)
    given = (master, gradient, first, second, copy, told, table, blocks, master.numel())
    adamw_kernel[grid](*given, CLEAR=clear, BLOCK=BLOCK, **DEFAULT.options())
    return told


def momenta(
    gradient: Tensor,
    momentum: Tensor,
    total: Tensor | None,
    slow: Tensor | None,
    table: Tensor,
    blocks: Tensor | None = None,
    clear: bool = False,
) -> None:
    """As reference.momenta, for float32 momenta."""
    given = (gradient, momentum, total, slow, table, blocks, momentum.numel())
    momenta_kernel[_grid(momentum)](*given, CLEAR=clear, BLOCK=BLOCK, **DEFAULT.options())


def descend(
    master: Tensor, direction: Tensor, copy: Tensor | None, table: Tensor, blocks: Tensor | None = None
) -> Tensor:
    """As reference.descend, for float32 masters."""
    grid = _grid(master)
    told = torch.empty(grid, dtype=torch.float32, device=master.device)
    given = (master, direction, copy, told, table, blocks, master.numel())
    descend_kernel[grid](*given, BLOCK=BLOCK, **DEFAULT.options())
    return told


def launches() -> list[Launch]:
    """What is compiled ahead of time: a shard of a bfloat16 model, one level a launch and several.

    Where its length is no multiple of 16, loads are narrow: right, but slower, as of a model of odd widths on odd replicas.
    """
    f32, bf16, i32 = torch.float32, torch.bfloat16, torch.int32
    found = []
    for name, blocks, count in (("one level", None, 2**28), ("levels", i32, 2**28), ("odd length", None, 2**28 + 2)):
        stream, registers = count % 16 == 0, 64 if count % 16 == 0 else 112
        clear, block = {"CLEAR": True, "BLOCK": BLOCK}, {"BLOCK": BLOCK}
        adam = (f32, f32, f32, f32, bf16, f32, f32, blocks, count)
        gather, along = (f32, f32, f32, f32, f32, blocks, count), (f32, f32, bf16, f32, f32, blocks, count)
        found += [
            Launch(f"adamw, {name}", adamw_kernel, adam, clear, [DEFAULT], False, stream, registers),
            Launch(
                f"momenta, {name}",
                momenta_kernel,
                gather,
                {**clear, "CLEAR": False},
                [DEFAULT],
                False,
                stream,
                registers,
            ),
            Launch(f"descend, {name}", descend_kernel, along, block, [DEFAULT], False, stream, registers),
        ]
    narrow = (f32, bf16, f32, f32, bf16, f32, f32, None, 2**28)
    last = {"CLEAR": False, "BLOCK": BLOCK}
    return [
        *found,
        Launch("adamw, bfloat16 gradients", adamw_kernel, narrow, last, [DEFAULT], stream=True, registers=64),
    ]
