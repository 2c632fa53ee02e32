"""The main memory's walk with its weights on chip, forward and backward: a program a row and head, chunk after chunk.

Tiles: TILE tokens, K head width and M units (padded). Products take tf32, where the path by chunks multiplies float32 as
torch is told to (exactly, unless it may take tf32); sums and states are float32. Where documents begin
in a chunk its tokens are gone over twice: those whose anchor is the state before the chunk (way 0), then those whose anchor
is the initial state (way 1).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlscale_kernels.mlp_memory.triton import curve
from nlscale_kernels.self_modifying.given import DIFFERENTIABLE, Given, Walked
from nlscale_kernels.self_modifying.resident import kept_by
from nlscale_kernels.triton_build import INTERPRET, Config, Launch, dot
from nlscale_kernels.tuned import chosen

FORWARD = [Config({"TILE": tile}, warps=8, stages=1, least=90) for tile in (32, 64)]
BACKWARD = [Config({"TILE": tile}, warps=8, stages=1, least=90) for tile in (16, 32)]
SMALL = Config({"TILE": 16}, warps=4, stages=1)  # for the interpreter


@triton.jit
def place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a matrix's elements lie, and which there are."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return row * columns + column, (row < rows) & (column < columns)


@triton.jit
def of_way(fresh, first, offset, chunk, way, TILE: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Tokens `offset ...` of the chunk that begins at token `first` of all: which there are and go this way."""
    inside = offset + tl.arange(0, TILE) < chunk
    if DOCUMENTS:
        marks = tl.load(fresh + first + offset + tl.arange(0, TILE), mask=inside, other=2).to(tl.int32)
        inside &= marks == way
    return inside


@triton.jit
def begun(fresh, last, DOCUMENTS: tl.constexpr):
    """Whether a document began in the chunk whose last token is this: 0 or 1."""
    found = 0
    if DOCUMENTS:
        found = tl.load(fresh + last).to(tl.int32)
    return found


@triton.jit
def moving(turn, at, mask, whole):
    """What a turn does beside keeping `whole` of the state: small, so that tf32 rounds little of the state away."""
    row, column = tl.arange(0, at.shape[0])[:, None], tl.arange(0, at.shape[1])[None, :]
    return tl.load(turn + at, mask=mask, other=0.0) - tl.where((row == column) & mask, whole, 0.0)


@triton.jit
def told(q, out, spot, mask, W2, W1, UPCAST: tl.constexpr):
    """What the memory says to queries."""
    query = tl.load(q + spot, mask=mask, other=0.0)
    none = tl.zeros((query.shape[0], W2.shape[0]), tl.float32)
    active, _, _ = curve(dot(query, tl.trans(W2), none, "tf32", UPCAST), False)
    tl.store(out + spot, dot(active, tl.trans(W1), query, "tf32", UPCAST), mask=mask)


@triton.jit
def share_of(change, limit):
    """min(1, limit / norm)."""
    return limit / tl.maximum(tl.sqrt(tl.sum(change * change)), limit)


@triton.jit
def walk_kernel(
    q,
    k,
    v,
    rate,
    reach,
    write,
    hold,
    turn,
    factors,
    fresh,
    up,
    down,
    up_speed,
    down_speed,
    first_up,
    first_down,
    said,
    ups,
    downs,
    up_speeds,
    down_speeds,
    shares,
    heads,
    tokens,
    chunk,
    writes,
    width,
    units,
    limit,
    LIMITS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (B H,)."""
    head = tl.program_id(0).to(tl.int64)
    size, row_start, written = units * width, head // heads * tokens, writes * chunk
    at_up, in_up = place(units, width, M, K)
    at_down, in_down = place(width, units, K, M)
    at_turn, in_turn = place(width, width, K, K)
    columns = tl.arange(0, K)[None, :]
    W2 = tl.load(up + head * size + at_up, mask=in_up, other=0.0)
    W1 = tl.load(down + head * size + at_down, mask=in_down, other=0.0)
    state = head * (writes + 1) * size
    tl.store(ups + state + at_up, W2, mask=in_up)
    tl.store(downs + state + at_down, W1, mask=in_down)
    if hold is not None:
        S2 = tl.load(up_speed + head * size + at_up, mask=in_up, other=0.0)
        S1 = tl.load(down_speed + head * size + at_down, mask=in_down, other=0.0)
        tl.store(up_speeds + state + at_up, S2, mask=in_up)
        tl.store(down_speeds + state + at_down, S1, mask=in_down)
        tl.debug_barrier()
    for c in range(0, writes):
        renewed = begun(fresh, row_start + c * chunk + chunk - 1, DOCUMENTS)
        add2 = tl.zeros((M, K), tl.float32)
        add1, then1 = tl.zeros((K, M), tl.float32), tl.zeros((K, M), tl.float32)
        base2, base1 = W2, W1
        if hold is not None:
            scale = factors + (head * writes + c) * 4
            add2 = tl.load(scale + 1) * tl.load(up_speeds + state + at_up, mask=in_up, other=0.0)
            S1 = tl.load(down_speeds + state + at_down, mask=in_down, other=0.0)
            add1, then1 = -tl.load(scale + 2) * S1, -tl.load(scale + 3) * S1
        for way in range(0, 1 + renewed):
            U2, U1 = W2, W1
            if DOCUMENTS:
                second = way > 0
                U2 = tl.load(first_up + head % heads * size + at_up, mask=in_up & second, other=0.0)
                U1 = tl.load(first_down + head % heads * size + at_down, mask=in_down & second, other=0.0)
                U2, U1 = tl.where(second, U2, W2), tl.where(second, U1, W1)
                base2, base1 = U2, U1  # of the last way: the initial state where a document began
            for offset in range(0, chunk, TILE):
                inside = of_way(fresh, row_start + c * chunk, offset, chunk, way, TILE, DOCUMENTS)
                token = c * chunk + offset + tl.arange(0, TILE)
                mask = inside[:, None] & (columns < width)
                spot = (head * tokens + token)[:, None] * width + columns
                told(q, said, spot, mask, U2, U1, UPCAST)
                key, value = tl.load(k + spot, mask=mask, other=0.0), tl.load(v + spot, mask=mask, other=0.0)
                none = tl.zeros((TILE, M), tl.float32)
                active, rise, _ = curve(dot(key, tl.trans(U2), none, "tf32", UPCAST), False)
                aim, _, _ = curve(dot(value, tl.trans(U2), none, "tf32", UPCAST), False)
                error = dot(active - aim, tl.trans(U1), key - value, "tf32", UPCAST)
                back = rise * dot(error, U1, none, "tf32", UPCAST)
                pace = tl.load(rate + head * tokens + token, mask=inside, other=0.0)
                arrives = tl.load(reach + (head * written + token)[:, None] * width + columns, mask=mask, other=0.0)
                add2 = dot(tl.trans(back), -pace[:, None] * arrives, add2, "tf32", UPCAST)
                share = pace * tl.load(write + head * written + token, mask=inside, other=0.0)
                add1 = dot(tl.trans(share[:, None] * error), active, add1, "tf32", UPCAST)
                if hold is not None:
                    share = pace * tl.load(hold + head * written + token, mask=inside, other=0.0)
                    then1 = dot(tl.trans(share[:, None] * error), active, then1, "tf32", UPCAST)
        whole = tl.load(factors + (head * writes + c) * 4)
        moved = moving(turn + (head * writes + c) * width * width, at_turn, in_turn, whole)
        share2, share1 = 1.0, 1.0
        if LIMITS:
            share2, share1 = share_of(add2, limit), share_of(add1, limit)
            tl.store(shares + (head * writes + c) * 2, share2)
            tl.store(shares + (head * writes + c) * 2 + 1, share1)
        state += size
        W2 = dot(base2, moved, whole * base2 + share2 * add2, "tf32", UPCAST)
        W1 = whole * base1 - share1 * add1
        tl.store(ups + state + at_up, W2, mask=in_up)
        tl.store(downs + state + at_down, W1, mask=in_down)
        if hold is not None:
            tl.store(up_speeds + state + at_up, share2 * add2, mask=in_up)
            tl.store(down_speeds + state + at_down, -share1 * then1, mask=in_down)
            tl.debug_barrier()  # the next chunk reads what these threads have written
    for c in range(writes, tokens // chunk):
        renewed = begun(fresh, row_start + c * chunk + chunk - 1, DOCUMENTS)
        for way in range(0, 1 + renewed):
            U2, U1 = W2, W1
            if DOCUMENTS:
                second = way > 0
                U2 = tl.load(first_up + head % heads * size + at_up, mask=in_up & second, other=0.0)
                U1 = tl.load(first_down + head % heads * size + at_down, mask=in_down & second, other=0.0)
                U2, U1 = tl.where(second, U2, W2), tl.where(second, U1, W1)
            for offset in range(0, chunk, TILE):
                inside = of_way(fresh, row_start + c * chunk, offset, chunk, way, TILE, DOCUMENTS)
                token = c * chunk + offset + tl.arange(0, TILE)
                mask = inside[:, None] & (columns < width)
                told(q, said, (head * tokens + token)[:, None] * width + columns, mask, U2, U1, UPCAST)


@triton.jit
def heard(q, of, d_q, spot, mask, W2, W1, d_W2, d_W1, UPCAST: tl.constexpr):
    """Gradients of what the memory says to queries: stores d_q, gives d_W2 and d_W1 with theirs added."""
    query, d_said = tl.load(q + spot, mask=mask, other=0.0), tl.load(of + spot, mask=mask, other=0.0)
    none = tl.zeros((query.shape[0], W2.shape[0]), tl.float32)
    active, rise, _ = curve(dot(query, tl.trans(W2), none, "tf32", UPCAST), False)
    d_W1 = dot(tl.trans(d_said), active, d_W1, "tf32", UPCAST)
    d_before = rise * dot(d_said, W1, none, "tf32", UPCAST)
    d_W2 = dot(tl.trans(d_before), query, d_W2, "tf32", UPCAST)
    tl.store(d_q + spot, dot(d_before, W2, d_said, "tf32", UPCAST), mask=mask)
    return d_W2, d_W1


@triton.jit
def unwritten(
    k,
    v,
    rate,
    reach,
    write,
    hold,
    d_k,
    d_v,
    d_rate,
    d_reach,
    d_write,
    d_hold,
    at,
    at_written,
    inside,
    width,
    W2,
    W1,
    add2,
    add1,
    then1,
    d_W2,
    d_W1,
    UPCAST: tl.constexpr,
):
    """Gradients of what tokens write, from those of their sums (add2 ... then1): stores the tokens', gives the weights'."""
    columns = tl.arange(0, W2.shape[1])[None, :]
    mask = inside[:, None] & (columns < width)
    spot = at[:, None] * width + columns
    key, value = tl.load(k + spot, mask=mask, other=0.0), tl.load(v + spot, mask=mask, other=0.0)
    none = tl.zeros((key.shape[0], W2.shape[0]), tl.float32)
    flat = tl.zeros((key.shape[0], W2.shape[1]), tl.float32)
    active, rise, bend = curve(dot(key, tl.trans(W2), none, "tf32", UPCAST), False)
    aim, aim_rise, _ = curve(dot(value, tl.trans(W2), none, "tf32", UPCAST), False)
    error = dot(active - aim, tl.trans(W1), key - value, "tf32", UPCAST)
    inward = dot(error, W1, none, "tf32", UPCAST)
    pace = tl.load(rate + at, mask=inside, other=0.0)
    spread = tl.load(reach + at_written[:, None] * width + columns, mask=mask, other=0.0)
    d_arrives = dot(rise * inward, add2, flat, "tf32", UPCAST)
    tl.store(d_reach + at_written[:, None] * width + columns, -pace[:, None] * d_arrives, mask=mask)
    d_pace = -tl.sum(d_arrives * spread, 1)
    d_back = dot(-pace[:, None] * spread, tl.trans(add2), none, "tf32", UPCAST)
    each = tl.load(write + at_written, mask=inside, other=0.0)
    d_weighed = dot(active, tl.trans(add1), flat, "tf32", UPCAST)
    along = tl.sum(d_weighed * error, 1)
    tl.store(d_write + at_written, pace * along, mask=inside)
    d_pace += each * along
    share = (pace * each)[:, None]
    d_error = share * d_weighed
    d_active = dot(share * error, add1, none, "tf32", UPCAST)
    if hold is not None:
        each = tl.load(hold + at_written, mask=inside, other=0.0)
        d_weighed = dot(active, tl.trans(then1), flat, "tf32", UPCAST)
        along = tl.sum(d_weighed * error, 1)
        tl.store(d_hold + at_written, pace * along, mask=inside)
        d_pace += each * along
        share = (pace * each)[:, None]
        d_error += share * d_weighed
        d_active = dot(share * error, then1, d_active, "tf32", UPCAST)
    tl.store(d_rate + at, d_pace, mask=inside)
    d_inward = rise * d_back
    d_error = dot(d_inward, tl.trans(W1), d_error, "tf32", UPCAST)
    d_W1 = dot(tl.trans(error), d_inward, d_W1, "tf32", UPCAST)
    d_W1 = dot(tl.trans(d_error), active - aim, d_W1, "tf32", UPCAST)
    through = dot(d_error, W1, none, "tf32", UPCAST)
    d_before = bend * inward * d_back + rise * (d_active + through)
    d_aim = -aim_rise * through
    d_W2 = dot(tl.trans(d_before), key, d_W2, "tf32", UPCAST)
    d_W2 = dot(tl.trans(d_aim), value, d_W2, "tf32", UPCAST)
    tl.store(d_k + spot, dot(d_before, W2, d_error, "tf32", UPCAST), mask=mask)
    tl.store(d_v + spot, dot(d_aim, W2, -d_error, "tf32", UPCAST), mask=mask)
    return d_W2, d_W1


@triton.jit
def added(pointer, at, mask, value):
    """Adds to what stands there."""
    tl.store(pointer + at, tl.load(pointer + at, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def unmoved(
    turn,
    factors,
    hold,
    ups,
    downs,
    up_speeds,
    down_speeds,
    shares,
    d_turn,
    d_factors,
    d_up_speed,
    d_down_speed,
    d2,
    d1,
    base2,
    base1,
    step,
    own,
    state,
    width,
    units,
    limit,
    LIMITS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The step after a chunk (mlp_memory's step), backward: gradients of what tokens wrote, and of the state it began from.

    d2, d1: those of the state after it, which stands at `state`; `step` counts all rows' steps.
    """
    size = units * width
    at_up, in_up = place(units, width, M, K)
    at_down, in_down = place(width, units, K, M)
    at_turn, in_turn = place(width, width, K, K)
    scale = step * 4
    whole, share2, share1 = tl.load(factors + scale), 1.0, 1.0
    moved = moving(turn + step * width * width, at_turn, in_turn, whole)
    d_turned = dot(tl.trans(base2), d2, tl.zeros((K, K), tl.float32), "tf32", UPCAST)
    tl.store(d_turn + step * width * width + at_turn, d_turned, mask=in_turn)
    tl.store(d_factors + scale, tl.sum(base1 * d1))
    d_base2, d_base1 = dot(d2, tl.trans(moved), whole * d2, "tf32", UPCAST), whole * d1
    then1 = tl.zeros((K, M), tl.float32)
    if hold is not None:
        d2 += tl.load(d_up_speed + own + at_up, mask=in_up, other=0.0)
        then1 = tl.load(d_down_speed + own + at_down, mask=in_down, other=0.0)
    if LIMITS:  # what was added lies in the states before and after, and in the momentum
        share2, share1 = tl.load(shares + step * 2), tl.load(shares + step * 2 + 1)
        now1 = tl.load(downs + state + at_down, mask=in_down, other=0.0) - whole * base1
        along1 = tl.sum(now1 * d1)
        if hold is not None:
            now2 = tl.load(up_speeds + state + at_up, mask=in_up, other=0.0)
            along1 += tl.sum(tl.load(down_speeds + state + at_down, mask=in_down, other=0.0) * then1)
        else:
            now2 = tl.load(ups + state + at_up, mask=in_up, other=0.0)
            now2 -= dot(base2, moved, whole * base2, "tf32", UPCAST)
        d2 -= tl.where(share2 < 1.0, tl.sum(now2 * d2) / (limit * limit), 0.0) * now2
        d1 -= tl.where(share1 < 1.0, along1 / (limit * limit), 0.0) * now1
    add2, add1 = share2 * d2, share1 * d1
    if hold is not None:
        then1 *= share1
        S2 = tl.load(up_speeds + state - size + at_up, mask=in_up, other=0.0)
        S1 = tl.load(down_speeds + state - size + at_down, mask=in_down, other=0.0)
        tl.store(d_factors + scale + 1, tl.sum(S2 * add2))
        tl.store(d_factors + scale + 2, tl.sum(S1 * add1))
        tl.store(d_factors + scale + 3, tl.sum(S1 * then1))
        tl.store(d_up_speed + own + at_up, tl.load(factors + scale + 1) * add2, mask=in_up)
        carried = tl.load(factors + scale + 2) * add1 + tl.load(factors + scale + 3) * then1
        tl.store(d_down_speed + own + at_down, carried, mask=in_down)
    return add2, -add1, -then1, d_base2, d_base1


@triton.jit
def gradients_kernel(
    q,
    k,
    v,
    rate,
    reach,
    write,
    hold,
    turn,
    factors,
    fresh,
    first_up,
    first_down,
    ups,
    downs,
    up_speeds,
    down_speeds,
    shares,
    of,
    d_q,
    d_k,
    d_v,
    d_rate,
    d_reach,
    d_write,
    d_hold,
    d_turn,
    d_factors,
    d_up,
    d_down,
    d_up_speed,
    d_down_speed,
    d_first_up,
    d_first_down,
    heads,
    tokens,
    chunk,
    writes,
    width,
    units,
    limit,
    LIMITS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (B H,); d_up ... d_down_speed hold the gradients of the last state and become those of the first."""
    head = tl.program_id(0).to(tl.int64)
    size, row_start, written = units * width, head // heads * tokens, writes * chunk
    at_up, in_up = place(units, width, M, K)
    at_down, in_down = place(width, units, K, M)
    columns, own = tl.arange(0, K)[None, :], head * size
    initial, state = head % heads * size, (head * (writes + 1) + writes) * size
    for back in range(0, tokens // chunk):
        c = tokens // chunk - 1 - back
        renewed = begun(fresh, row_start + c * chunk + chunk - 1, DOCUMENTS)
        add2, d_base2 = tl.zeros((M, K), tl.float32), tl.load(d_up + own + at_up, mask=in_up, other=0.0)
        add1, d_base1 = tl.zeros((K, M), tl.float32), tl.load(d_down + own + at_down, mask=in_down, other=0.0)
        then1, heir = add1, 0  # the way that the chunk's end goes on from
        if c < writes:
            heir = renewed
            from_up, from_down = ups + state - size, downs + state - size
            if renewed > 0:
                from_up, from_down = first_up + initial, first_down + initial
            base2 = tl.load(from_up + at_up, mask=in_up, other=0.0)
            base1 = tl.load(from_down + at_down, mask=in_down, other=0.0)
            add2, add1, then1, d_base2, d_base1 = unmoved(
                *(turn, factors, hold, ups, downs, up_speeds, down_speeds, shares),
                *(d_turn, d_factors, d_up_speed, d_down_speed, d_base2, d_base1, base2, base1),
                *(head * writes + c, own, state, width, units, limit, LIMITS, K, M, UPCAST),
            )
            state -= size
        for way in range(0, 1 + renewed):
            d_W2, d_W1 = tl.zeros((M, K), tl.float32), tl.zeros((K, M), tl.float32)
            from_up, from_down = ups + state, downs + state
            if way > 0:
                from_up, from_down = first_up + initial, first_down + initial
            W2 = tl.load(from_up + at_up, mask=in_up, other=0.0)
            W1 = tl.load(from_down + at_down, mask=in_down, other=0.0)
            for offset in range(0, chunk, TILE):
                inside = of_way(fresh, row_start + c * chunk, offset, chunk, way, TILE, DOCUMENTS)
                token = c * chunk + offset + tl.arange(0, TILE)
                spot = (head * tokens + token)[:, None] * width + columns
                mask = inside[:, None] & (columns < width)
                d_W2, d_W1 = heard(q, of, d_q, spot, mask, W2, W1, d_W2, d_W1, UPCAST)
                if c < writes:
                    d_W2, d_W1 = unwritten(
                        *(k, v, rate, reach, write, hold, d_k, d_v, d_rate, d_reach, d_write, d_hold),
                        *(head * tokens + token, head * written + token, inside, width),
                        *(W2, W1, add2, add1, then1, d_W2, d_W1, UPCAST),
                    )
            if way == heir:
                d_W2 += d_base2
                d_W1 += d_base1
            if way > 0:
                added(d_first_up, own + at_up, in_up, d_W2)
                added(d_first_down, own + at_down, in_down, d_W1)
            else:
                tl.store(d_up + own + at_up, d_W2, mask=in_up)
                tl.store(d_down + own + at_down, d_W1, mask=in_down)
        tl.debug_barrier()  # the next chunk reads what these threads have written


class Kept(NamedTuple):
    """What forward keeps, as views of one buffer (op.kept_by)."""

    ups: Tensor  # (B H, N + 1, M K)
    downs: Tensor
    up_speeds: Tensor | None
    down_speeds: Tensor | None
    shares: Tensor  # (B H, N, 2), where there is a limit


def parted(kept: Tensor, given: Given) -> Kept:
    """The views."""
    (B, H, count, _, _), (units, width) = given.turn.shape, given.up.shape[2:]
    states, momentum = B * H * (count + 1) * units * width, given.hold is not None
    *parts, shares = kept.split([states] * (4 if momentum else 2) + [2 * B * H * count])
    return Kept._make((*parts, *([] if momentum else [None, None]), shares))


def ready(given: Given) -> Given:
    """Contiguous; marks of documents as bytes."""
    fresh = None if given.fresh is None else given.fresh.to(torch.int8).contiguous()
    flat = (x.contiguous() if isinstance(x, Tensor) else x for x in given)
    return Given._make(flat)._replace(fresh=fresh)


def shape_of(given: Given, config: Config) -> tuple[tuple[int | float, ...], dict[str, Any]]:
    """Sizes and constants of a launch."""
    (_, heads, tokens, width), (count, units) = given.q.shape, (given.turn.shape[2], given.up.shape[2])
    sizes = (heads, tokens, given.chunk, count, width, units, float(given.clip))
    padded = {"K": max(16, triton.next_power_of_2(width)), "M": max(16, triton.next_power_of_2(units))}
    constants = {"LIMITS": given.clip > 0, "DOCUMENTS": given.fresh is not None, "UPCAST": INTERPRET, **padded}
    return sizes, {**constants, **config.options()}


def config_for(kernel: str, configs: list[Config], like: Tensor) -> Config:
    """The one that was tuned for the width of `like`."""
    return SMALL if INTERPRET else chosen(kernel, configs, like.device, width=like.shape[-1])


def walked(given: Given, config: Config | None = None) -> Walked:
    """As resident.resident."""
    given = ready(given)
    said, kept = torch.empty_like(given.q), given.q.new_empty(kept_by(given))
    views = parted(kept, given)
    sizes, constants = shape_of(given, config or config_for("resident.walk", FORWARD, given.q))
    (B, H), like = given.q.shape[:2], (given.up, given.down, given.up_speed, given.down_speed)
    walk_kernel[(B * H,)](*given[:-2], said, *views, *sizes, **constants)
    ends = [
        given.q.new_empty(0) if x is None or part is None else part.view(B, H, -1, *x.shape[2:])[:, :, -1].clone()
        for x, part in zip(like, views, strict=False)
    ]
    return Walked._make((said, *ends, kept))


def gradients(given: Given, kept: Tensor, of: list[Tensor], config: Config | None = None) -> list[Tensor]:
    """As resident.backward."""
    given = ready(given)
    sizes, constants = shape_of(given, config or config_for("resident.gradients", BACKWARD, given.q))
    written, (B, H) = given.write.shape[2], given.q.shape[:2]
    known = {name: getattr(given, name) for name in DIFFERENTIABLE}
    found: dict[str, Any] = {name: None if x is None else torch.empty_like(x) for name, x in known.items()}
    for name in ("k", "v", "rate"):  # tokens of the chunk that is not written
        found[name][:, :, written:] = 0
    found["factors"].zero_()
    states = [x.clone(memory_format=torch.contiguous_format) for x in of[1:]]
    for name, x in zip(("up", "down", "up_speed", "down_speed"), states, strict=False):
        found[name] = x
    firsts = [torch.zeros_like(x) for x in (given.up, given.down)]
    inputs = (*given[:10], given.first_up, given.first_down)
    outputs = [found[name] for name in (*DIFFERENTIABLE[:9], "up", "down", "up_speed", "down_speed")]
    gradients_kernel[(B * H,)](
        *inputs, *parted(kept, given), of[0].contiguous(), *outputs, *firsts, *sizes, **constants
    )
    found["first_up"], found["first_down"] = (x.sum(0) for x in firsts)
    return [given.q.new_empty(0) if x is None else x for x in found.values()]


def launches() -> list[Launch]:
    """What is compiled ahead of time: heads of 64, 8 chunks of 64 tokens; with momentum and a limit, and with neither."""
    some, none, found, count = torch.float32, None, [], 8
    budgeted = partial(Launch, product=True, turned=True)
    sizes = (16, 64 * count, 64, count, 64, 64, 1.0)
    for name, momentum, fresh in (
        ("one document", some, none),
        ("documents", some, torch.int8),
        ("plain", none, none),
    ):
        constants = {"LIMITS": name != "plain", "DOCUMENTS": fresh is not None, "K": 64, "M": 64, "UPCAST": False}
        tokens = (*[some] * 6, momentum, some, some, fresh)
        kept = (some, some, momentum, momentum, some)
        given = (*tokens, some, some, momentum, momentum, some, some, some, *kept, *sizes)
        found.append(budgeted(f"walk {name}", walk_kernel, given, constants, FORWARD, spills=4096))
        gradients = (*[some] * 6, momentum, *[some] * 4, momentum, momentum, some, some)
        given = (*tokens, some, some, *kept, some, *gradients, *sizes)
        name = f"walk gradients {name}"  # most of 32 wide tiles on sm_100 by Triton 3.8
        found.append(budgeted(name, gradients_kernel, given, constants, BACKWARD, spills=6144))
    return found
