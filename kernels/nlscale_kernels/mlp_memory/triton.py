"""What lies between a memory's products, each in one pass: bytes in, float32, bytes out."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlscale_kernels.mlp_memory.step import Moved, Step
from nlscale_kernels.triton_build import INTERPRET, Config, Launch

TILE = 1024  # elements of a program
STEP = Config({}, warps=4, stages=2)
WIDTH = 32 if INTERPRET else 1024  # elements of a memory's weight at a time
SLICE = 64 if INTERPRET else 16384  # of a program: a memory of width 1024 is 64 of them


@triton.jit
def curve(h, GELU: tl.constexpr):
    """s, s' and s'' of GELU or SiLU."""
    if GELU:
        below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        density = tl.exp(-0.5 * h * h) * 0.3989422804014327
        return h * below, below + h * density, density * (2.0 - h * h)
    else:
        gate = tl.sigmoid(h)
        value = h * gate
        return value, gate + value * (1.0 - gate), gate * (1.0 - gate) * (2.0 + h - 2.0 * value)


@triton.jit
def place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, columns and mask of a tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def active_kernel(
    before,
    out,
    rows,
    units,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """s(before)."""
    row, column, mask = place(rows, units, ROWS, COLUMNS)
    at = row * units * (1 + GATED) + column
    value, _, _ = curve(tl.load(before + at, mask=mask, other=0.0).to(tl.float32), GELU)
    if GATED:
        value *= tl.load(before + at + units, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * units + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def returned_kernel(
    before,
    inward,
    beside,
    out,
    rows,
    units,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """J^T inward, + beside."""
    row, column, mask = place(rows, units, ROWS, COLUMNS)
    at = row * units * (1 + GATED) + column
    value, rise, _ = curve(tl.load(before + at, mask=mask, other=0.0).to(tl.float32), GELU)
    of = tl.load(inward + row * units + column, mask=mask, other=0.0).to(tl.float32)
    mine = rise * of
    if GATED:
        mine *= tl.load(before + at + units, mask=mask, other=0.0).to(tl.float32)
        second = value * of
        if beside is not None:
            second += tl.load(beside + at + units, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at + units, second.to(out.dtype.element_ty), mask=mask)
    if beside is not None:
        mine += tl.load(beside + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, mine.to(out.dtype.element_ty), mask=mask)


@triton.jit
def second_kernel(
    before,
    inward,
    d_back,
    active,
    pulled,
    pushed,
    bent,
    rows,
    units,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """glue.Second."""
    narrow: tl.constexpr = before.dtype.element_ty
    row, column, mask = place(rows, units, ROWS, COLUMNS)
    at = row * units * (1 + GATED) + column
    spot = row * units + column
    value, rise, bend = curve(tl.load(before + at, mask=mask, other=0.0).to(tl.float32), GELU)
    of = tl.load(inward + spot, mask=mask, other=0.0).to(tl.float32)
    back = tl.load(d_back + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(before + at + units, mask=mask, other=0.0).to(tl.float32)
        back_up = tl.load(d_back + at + units, mask=mask, other=0.0).to(tl.float32)
        tl.store(active + spot, (value * up).to(narrow), mask=mask)
        tl.store(pulled + at, (rise * up * of).to(narrow), mask=mask)
        tl.store(pulled + at + units, (value * of).to(narrow), mask=mask)
        tl.store(pushed + spot, (rise * up * back + value * back_up).to(narrow), mask=mask)
        tl.store(bent + at, ((bend * up * back + rise * back_up) * of).to(narrow), mask=mask)
        tl.store(bent + at + units, (rise * back * of).to(narrow), mask=mask)
    else:
        tl.store(active + spot, value.to(narrow), mask=mask)
        tl.store(pulled + spot, (rise * of).to(narrow), mask=mask)
        tl.store(pushed + spot, (rise * back).to(narrow), mask=mask)
        tl.store(bent + spot, (bend * of * back).to(narrow), mask=mask)


@triton.jit
def errors_kernel(
    heard,
    target,
    key,
    weights,
    error,
    weighed,
    rows,
    memories,
    targets,
    tokens,
    width,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program: some rows (B H N C) of all columns O."""
    narrow: tl.constexpr = heard.dtype.element_ty
    row, column, mask = place(rows, width, ROWS, COLUMNS)
    head, memory = row // (tokens * memories), (row // tokens) % memories
    token = head * tokens + row % tokens
    aim = (head * targets + memory % targets) * tokens + row % tokens
    value = tl.load(heard + row * width + column, mask=mask, other=0.0).to(tl.float32)
    value -= tl.load(target + aim * width + column, mask=mask, other=0.0).to(tl.float32)
    if key is not None:
        value += tl.load(key + token * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(error + row * width + column, value.to(narrow), mask=mask)
    for w in tl.static_range(WEIGHTS):
        weight = tl.load(weights + token * WEIGHTS + w, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(weighed + (row * WEIGHTS + w) * width + column, (value * weight).to(narrow), mask=mask)


@triton.jit
def of_errors_kernel(
    heard,
    error,
    weights,
    through,
    d_weights,
    d_error,
    weighed,
    rows,
    memories,
    tokens,
    width,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same rows; d_weights a memory (B, H, N, C, W)."""
    narrow: tl.constexpr = heard.dtype.element_ty
    row, column, mask = place(rows, width, ROWS, COLUMNS)
    token = row // (tokens * memories) * tokens + row % tokens
    value = tl.load(error + row * width + column, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(through + row * width + column, mask=mask, other=0.0).to(tl.float32)
    for w in tl.static_range(WEIGHTS):
        here = (row * WEIGHTS + w) * width + column
        said = tl.load(heard + here, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weights + token * WEIGHTS + w, mask=row < rows, other=0.0).to(tl.float32)
        summed = tl.sum(said * value, 1)[:, None]
        tl.store(d_weights + row * WEIGHTS + w, summed, mask=row < rows)
        total += said * weight
        tl.store(weighed + here, (value * weight).to(narrow), mask=mask)
    tl.store(d_error + row * width + column, total.to(narrow), mask=mask)


@triton.jit
def factor(factors, head):
    """A row and head's number; 1 where there are none."""
    found = 1.0
    if factors is not None:
        found = tl.load(factors + head).to(tl.float32)
    return found


@triton.jit
def sums(speed, written, held, at, mask, carry, left, sign):
    """What is added, and the momentum after it, before any limit."""
    add = sign * tl.load(written + at, mask=mask, other=0.0).to(tl.float32)
    then = add
    if speed is not None:
        was = tl.load(speed + at, mask=mask, other=0.0).to(tl.float32)
        add += carry * was
        then = add
        if held is not None:
            then = sign * tl.load(held + at, mask=mask, other=0.0).to(tl.float32) + left * was
    return add, then


@triton.jit
def lengths(speed, written, held, d_after, d_then, memory, size, begin, end, carry, left, sign, WIDTH: tl.constexpr):
    """Of elements begin ... end of a memory: the sum of squares of what is added, and its product with the gradients."""
    square, along = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(begin, end, WIDTH):
        place = first + tl.arange(0, WIDTH)
        mask, at = place < end, memory * size + place
        add, then = sums(speed, written, held, at, mask, carry, left, sign)
        square += add * add
        if d_after is not None:
            along += add * tl.load(d_after + at, mask=mask, other=0.0).to(tl.float32)
            if speed is not None:
                along += then * tl.load(d_then + at, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(square), tl.sum(along)


@triton.jit
def lengths_kernel(
    speed,
    written,
    held,
    d_after,
    d_then,
    carry,
    left,
    found,
    memories,
    size,
    slices,
    sign,
    SLICE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program a memory and slice of it: its two sums, found (2, all memories, slices)."""
    memory, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    carried, remains = factor(carry, memory // memories), factor(left, memory // memories)
    begin = part * SLICE
    end = tl.minimum(begin + SLICE, size)
    square, along = lengths(
        speed, written, held, d_after, d_then, memory, size, begin, end, carried, remains, sign, WIDTH
    )
    tl.store(found + memory * slices + part, square)
    if d_after is not None:
        tl.store(found + (tl.num_programs(0) + memory) * slices + part, along)


@triton.jit
def added_up(found, memory, slices, PARTS: tl.constexpr):
    """The sum over a memory's slices, in one order."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(found + memory * slices + part, mask=part < slices, other=0.0))


@triton.jit
def step_kernel(
    state,
    speed,
    written,
    held,
    keep,
    carry,
    left,
    found,
    after,
    momentum,
    memories,
    size,
    slices,
    sign,
    limit,
    LIMITS: tl.constexpr,
    SLICE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program a memory and slice: step.stepped. `found`: of lengths_kernel; None: a memory is one slice."""
    memory, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * SLICE
    head, end = memory // memories, tl.minimum(begin + SLICE, size)
    narrow: tl.constexpr = after.dtype.element_ty
    kept, carried, remains = factor(keep, head), factor(carry, head), factor(left, head)
    share = 1.0
    if LIMITS:
        if found is not None:
            total = added_up(found, memory, slices, PARTS)
        else:
            total, _ = lengths(
                speed, written, held, None, None, memory, size, begin, end, carried, remains, sign, WIDTH
            )
        share = limit / tl.maximum(tl.sqrt(total), limit)
    for first in range(begin, end, WIDTH):
        place = first + tl.arange(0, WIDTH)
        mask, at = place < end, memory * size + place
        add, then = sums(speed, written, held, at, mask, carried, remains, sign)
        value = kept * tl.load(state + at, mask=mask, other=0.0).to(tl.float32) + share * add
        tl.store(after + at, value.to(narrow), mask=mask)
        if speed is not None:
            tl.store(momentum + at, (share * then).to(narrow), mask=mask)


@triton.jit
def step_gradients_kernel(
    state,
    speed,
    written,
    held,
    keep,
    carry,
    left,
    found,
    d_after,
    d_then,
    d_state,
    d_speed,
    d_written,
    d_held,
    d_keep,
    d_carry,
    d_left,
    memories,
    size,
    slices,
    sign,
    limit,
    LIMITS: tl.constexpr,
    SLICE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program a memory and slice: step.gradients; those of factors a memory and slice. `found` as step_kernel's."""
    memory, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, head = part * SLICE, memory // memories
    end, spot = tl.minimum(begin + SLICE, size), memory * slices + part
    narrow: tl.constexpr = d_state.dtype.element_ty
    kept, carried, remains = factor(keep, head), factor(carry, head), factor(left, head)
    share, turn = 1.0, 0.0
    if LIMITS:
        if found is not None:
            total = added_up(found, memory, slices, PARTS)
            along = added_up(found, tl.num_programs(0) + memory, slices, PARTS)
        else:
            total, along = lengths(
                speed, written, held, d_after, d_then, memory, size, begin, end, carried, remains, sign, WIDTH
            )
        share = limit / tl.maximum(tl.sqrt(total), limit)
        turn = tl.where(share < 1.0, along * share / tl.maximum(total, 1e-30), 0.0)
    of_keep = tl.zeros((WIDTH,), tl.float32)
    of_carry, of_left = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(begin, end, WIDTH):
        place = first + tl.arange(0, WIDTH)
        mask, at = place < end, memory * size + place
        add, _ = sums(speed, written, held, at, mask, carried, remains, sign)
        of = tl.load(d_after + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_state + at, (kept * of).to(narrow), mask=mask)
        if keep is not None:
            of_keep += of * tl.load(state + at, mask=mask, other=0.0).to(tl.float32)
        of_add = share * of - turn * add
        if speed is not None:
            of_then = share * tl.load(d_then + at, mask=mask, other=0.0).to(tl.float32)
            was = tl.load(speed + at, mask=mask, other=0.0).to(tl.float32)
            if held is None:
                of_add += of_then
                tl.store(d_speed + at, (carried * of_add).to(narrow), mask=mask)
            else:
                tl.store(d_held + at, (sign * of_then).to(narrow), mask=mask)
                tl.store(d_speed + at, (carried * of_add + remains * of_then).to(narrow), mask=mask)
                of_left += was * of_then
            of_carry += was * of_add
        tl.store(d_written + at, (sign * of_add).to(narrow), mask=mask)
    if keep is not None:
        tl.store(d_keep + spot, tl.sum(of_keep))
    if speed is not None:
        tl.store(d_carry + spot, tl.sum(of_carry))
        if held is not None:
            tl.store(d_left + spot, tl.sum(of_left))


def slices_of(step: Step) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, memories by slices of each, and the kernels' constants."""
    like = step.written
    slices = triton.cdiv(like.shape[3] * like.shape[4], SLICE)
    parts = triton.next_power_of_2(slices)
    return (like.shape[:3].numel(), slices), {"SLICE": SLICE, "PARTS": parts, "WIDTH": WIDTH, **STEP.options()}


def lengths_of(
    tensors: Sequence[Tensor | None], d: Sequence[Tensor | None], step: Step, grid: tuple[int, int]
) -> Tensor | None:
    """What lengths_kernel finds, where there is a limit and a memory is more than one slice."""
    if step.limit <= 0 or grid[1] == 1:
        return None
    _, speed, written, held, _, carry, left = tensors
    found = torch.empty(2, *grid, dtype=torch.float32, device=step.written.device)
    sizes = (step.written.shape[2], step.written.shape[3] * step.written.shape[4], grid[1], float(step.sign))
    lengths_kernel[grid](
        speed, written, held, *d, carry, left, found, *sizes, SLICE=SLICE, WIDTH=WIDTH, **STEP.options()
    )
    return found


def stepped(step: Step) -> tuple[Tensor, Tensor]:
    """As step.forward."""
    tensors = [x if x is None else x.contiguous() for x in step[:7]]
    like, (grid, constants) = step.written, slices_of(step)
    after, then = like.new_empty(like.shape), like.new_empty(like.shape if step.speed is not None else (0,))
    found = lengths_of(tensors, (None, None), step, grid)
    sizes = (like.shape[2], like.shape[3] * like.shape[4], grid[1], float(step.sign), float(step.limit))
    step_kernel[grid](*tensors, found, after, then, *sizes, LIMITS=step.limit > 0, **constants)
    return after, then


def step_gradients(step: Step, d_after: Tensor, d_then: Tensor) -> Moved:
    """As step.gradients."""
    tensors = [x if x is None else x.contiguous() for x in step[:7]]
    (grid, constants), of = slices_of(step), (d_after.contiguous(), d_then.contiguous())
    like, memories = step.written, step.written.shape[:3]
    found = lengths_of(tensors, of, step, grid)
    whole = [like.new_empty(0 if x is None else like.shape) for x in step[:4]]
    wide = (*memories, grid[1])
    each = [torch.empty(0 if x is None else wide, dtype=torch.float32, device=like.device) for x in step[4:7]]
    sizes = (like.shape[2], like.shape[3] * like.shape[4], grid[1], float(step.sign), float(step.limit))
    given = (*tensors, found, *of, *whole, *each, *sizes)
    step_gradients_kernel[grid](*given, LIMITS=step.limit > 0, **constants)
    factors = [x if step[4 + place] is None else x.sum((2, 3)).to(like.dtype) for place, x in enumerate(each)]
    return Moved(*whole, *factors)


def tiles(columns: int, whole: bool) -> Config:
    """Rows and columns of a program; `whole`: all columns."""
    wide = triton.next_power_of_2(columns)
    wide = wide if whole else min(wide, 128)
    tile = 64 if INTERPRET else TILE
    return Config({"ROWS": max(1, tile // wide), "COLUMNS": wide}, warps=4, stages=1)


def grid_of(config: Config, rows: int, columns: int) -> tuple[int, int]:
    """Programs for all tiles."""
    return triton.cdiv(rows, config.tiles["ROWS"]), triton.cdiv(columns, config.tiles["COLUMNS"])


def inner(before: Tensor, kind: str) -> tuple[tuple[int, int], Config, dict[str, bool]]:
    """Rows and units, their tiles, and which curve."""
    gated = kind == "swiglu"
    units = before.shape[-1] // (1 + gated)
    return (before.shape[:-1].numel(), units), tiles(units, False), {"GELU": kind == "gelu", "GATED": gated}


def active(before: Tensor, kind: str) -> Tensor:
    """As op.active."""
    before, (sizes, config, which) = before.contiguous(), inner(before, kind)
    out = before.new_empty(*before.shape[:-1], sizes[1])
    active_kernel[grid_of(config, *sizes)](before, out, *sizes, **which, **config.options())
    return out


def returned(before: Tensor, inward: Tensor, beside: Tensor | None, kind: str) -> Tensor:
    """As op.returned."""
    before, inward, (sizes, config, which) = before.contiguous(), inward.contiguous(), inner(before, kind)
    beside = beside if beside is None else beside.contiguous()
    out = torch.empty_like(before)
    returned_kernel[grid_of(config, *sizes)](before, inward, beside, out, *sizes, **which, **config.options())
    return out


def second(before: Tensor, inward: Tensor, d_back: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As op.second."""
    before, inward, d_back = (x.contiguous() for x in (before, inward, d_back))
    sizes, config, which = inner(before, kind)
    said = tuple(torch.empty_like(x) for x in (inward, before, inward, before))
    second_kernel[grid_of(config, *sizes)](before, inward, d_back, *said, *sizes, **which, **config.options())
    return said  # type: ignore[return-value]


def errors(heard: Tensor, target: Tensor, key: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As op.errors."""
    heard, target, weights = (x.contiguous() for x in (heard, target, weights))
    key = key if key is None else key.contiguous()
    (*_, memories, tokens, width), count = heard.shape, weights.shape[-1]
    rows, config = heard.shape[:-1].numel(), tiles(width, True)
    error, weighed = torch.empty_like(heard), heard.new_empty(*heard.shape[:-1], count * width)
    sizes = (rows, memories, target.shape[2], tokens, width)
    given = (heard, target, key, weights, error, weighed, *sizes)
    errors_kernel[grid_of(config, rows, width)](*given, WEIGHTS=count, **config.options())
    return error, weighed


def of_errors(heard: Tensor, error: Tensor, weights: Tensor, through: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As op.of_errors."""
    heard, error, weights, through = (x.contiguous() for x in (heard, error, weights, through))
    (*_, memories, tokens, width), count = error.shape, weights.shape[-1]
    rows, config = error.shape[:-1].numel(), tiles(width, True)
    d_weights = torch.empty(*error.shape[:-1], count, dtype=torch.float32, device=error.device)
    d_error, weighed = torch.empty_like(error), torch.empty_like(heard)
    given = (heard, error, weights, through, d_weights, d_error, weighed, rows, memories, tokens, width)
    of_errors_kernel[grid_of(config, rows, width)](*given, WEIGHTS=count, **config.options())
    return d_weights.sum(2).to(weights.dtype), d_error, weighed


def launches() -> list[Launch]:
    """What is compiled ahead of time: 256 units of a memory of 64, in float32 and bfloat16; gate memories of width 1."""
    found, sizes, elements = [], (2**20, 256), tiles(256, False)
    for narrow in (torch.float32, torch.bfloat16):
        for kind, which in (("silu", (False, False)), ("gelu", (True, False)), ("swiglu", (False, True))):
            curves, name = dict(zip(("GELU", "GATED"), which, strict=True)), f"{kind} {str(narrow)[6:]}"
            for kernel, count in ((active_kernel, 2), (returned_kernel, 4), (second_kernel, 7)):
                given = (*[narrow] * count, *sizes)
                short = kernel.__name__.removesuffix("_kernel")
                found.append(Launch(f"{short} {name}", kernel, given, curves, [elements], stream=True))
        for width in (64, 1):
            name, weights = f"{width} {str(narrow)[6:]}", {"WEIGHTS": 2}
            given = (*[narrow] * 6, 2**20, 2, 1, 512, width)
            config = tiles(width, True)
            found.append(Launch(f"errors {name}", errors_kernel, given, weights, [config], stream=width > 1))
            given = (*[narrow] * 4, torch.float32, narrow, narrow, 2**20, 2, 512, width)
            found.append(Launch(f"of_errors {name}", of_errors_kernel, given, weights, [config], stream=width > 1))
        for slices, lengths in ((1, None), (64, torch.float32)):  # memories of 128 x 128, and of 1024 x 1024
            constants = {"LIMITS": True, "SLICE": SLICE, "PARTS": slices, "WIDTH": WIDTH}
            sizes_of_step, name = (2, slices * SLICE, slices, -1.0, 0.5), f"{slices} {str(narrow)[6:]}"
            given = (*[narrow] * 7, lengths, narrow, narrow, *sizes_of_step)
            found.append(Launch(f"step {name}", step_kernel, given, constants, [STEP], stream=True))
            given = (*[narrow] * 7, lengths, *[narrow] * 6, *[torch.float32] * 3, *sizes_of_step)
            found.append(Launch(f"step_gradients {name}", step_gradients_kernel, given, constants, [STEP], stream=True))
        given = (*[narrow] * 7, torch.float32, 2, 64 * SLICE, 64, -1.0)
        constants = {"SLICE": SLICE, "WIDTH": WIDTH}
        found.append(Launch(f"lengths {str(narrow)[6:]}", lengths_kernel, given, constants, [STEP]))
    return found
