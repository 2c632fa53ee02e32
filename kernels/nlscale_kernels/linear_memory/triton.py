"""Forward in three kernels: what needs no state (chunk by chunk), the states (one chunk after the other), the outputs.

Tiles: C tokens of a chunk (padded), K key width (padded), V a part of the value width. Products are of the inputs' dtype,
float32 as tf32; the inverse and the states in float32.
"""

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlscale_kernels.linear_memory.reference import Given
from nlscale_kernels.triton_build import INTERPRET, Config, Launch, dot
from nlscale_kernels.tuned import chosen

INVERT = Config({}, warps=4, stages=1)
APPLY = [Config({"V": 64}, warps=4, stages=1), Config({"V": 32}, warps=4, stages=1)]
STATES = [Config({"V": 32}, warps=8, stages=1), Config({"V": 16}, warps=8, stages=1)]
OUTPUTS = [Config({"V": 64}, warps=4, stages=1), Config({"V": 64}, warps=8, stages=1)]
BLOCK = 64  # tokens whose inverse one program makes
SMALL = Config({"V": 16}, warps=4, stages=1)  # for the interpreter, and narrow values


@triton.jit
def share(row, column, tokens, inside, document, begin, DIAGONAL: tl.constexpr):
    """reference.py's between (DIAGONAL -1) and through (0): (C, C); `begin`: where the chunk's documents stand."""
    allowed = tokens[:, None] >= tokens[None, :] - DIAGONAL
    if document is not None:
        numbers = tl.load(document + begin + tokens, mask=inside, other=0)
        allowed &= numbers[:, None] == numbers[None, :]
    return tl.exp2(tl.where(allowed, row[:, None] - column[None, :], -10000.0))


@triton.jit
def substituted(A, C: tl.constexpr):
    """(I + A)^-1 of each 16 x 16 block on the diagonal, row by row; zero elsewhere."""
    G: tl.constexpr = C // 16
    tokens = tl.arange(0, C)
    same = (tokens[:, None] // 16) == (tokens[None, :] // 16)
    blocks = tl.sum(tl.reshape(tl.where(same, A, 0.0), (G, 16, G, 16)), 2)
    rows = tl.arange(0, 16)
    done = -blocks
    for i in range(2, 16):
        mine = rows[None, :, None] == i
        row = tl.sum(tl.where(mine, -blocks, 0.0), 1)
        row += tl.sum(row[:, :, None] * done, 1)
        done = tl.where(mine, row[:, None, :], done)
    spread = tl.reshape(tl.broadcast_to(done[:, :, None, :], (G, 16, G, 16)), (C, C))
    return tl.where(same, spread, 0.0) + tl.where(tokens[:, None] == tokens[None, :], 1.0, 0.0)


@triton.jit
def inverse(A, C: tl.constexpr, UPCAST: tl.constexpr):
    """(I + A)^-1 for A below the diagonal: D^-1 of its diagonal blocks, then (I + M)^-1 with M = D^-1 (A outside them).

    M to the power C / 16 is zero.
    """
    near = substituted(A, C)
    if C > 16:
        tokens = tl.arange(0, C)
        apart = (tokens[:, None] // 16) != (tokens[None, :] // 16)
        none = tl.zeros((C, C), tl.float32)
        power = dot(near, tl.where(apart, A, 0.0), none, "tf32x3", UPCAST)
        total = near - dot(power, near, none, "tf32x3", UPCAST)
        if C > 32:
            power = dot(power, power, none, "tf32x3", UPCAST)
            total += dot(power, total, none, "tf32x3", UPCAST)
        near = total
    return near


@triton.jit
def invert_kernel(
    k,
    erase,
    earlier,
    total,
    document,
    inverses,
    heads,
    count,
    chunk,
    key_width,
    blocks,
    C: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (blocks N, B H): (I + A)^-1 of the blocks of C tokens on a chunk's diagonal."""
    n, head = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    tokens, keys = tl.program_id(0) % blocks * C + tl.arange(0, C), tl.arange(0, K)
    inside = tokens < chunk
    at = head * count * chunk + n * chunk + tokens
    key_mask = inside[:, None] & (keys[None, :] < key_width)
    key = tl.load(k + at[:, None] * key_width + keys[None, :], mask=key_mask, other=0.0)
    taken = tl.load(erase + at, mask=inside, other=0.0)
    row_share = tl.load(earlier + at, mask=inside, other=0.0)
    column_share = tl.load(total + at, mask=inside, other=0.0)
    row = (head // heads) * count * chunk + n * chunk
    A = dot(key, tl.trans(key), tl.zeros((C, C), tl.float32), "tf32", UPCAST)
    A *= taken[:, None] * share(row_share, column_share, tokens, inside, document, row, -1)
    place = ((head * count + n) * chunk + tokens[:, None]) * chunk + tokens[None, :]
    tl.store(inverses + place, inverse(A, C, UPCAST), mask=inside[:, None] & inside[None, :])


@triton.jit
def merge_kernel(
    k,
    erase,
    earlier,
    total,
    document,
    inverses,
    heads,
    count,
    chunk,
    key_width,
    C: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (N, B H): where a chunk is two blocks, what stands below their inverses: -(I + A22)^-1 A21 (I + A11)^-1."""
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, keys = tl.arange(0, C), tl.arange(0, K)
    then = C + first
    inside, none = then < chunk, tl.zeros((C, C), tl.float32)
    begin = head * count * chunk + n * chunk
    wide = keys[None, :] < key_width
    before = tl.load(k + (begin + first)[:, None] * key_width + keys[None, :], mask=wide, other=0.0)
    after = tl.load(k + (begin + then)[:, None] * key_width + keys[None, :], mask=wide & inside[:, None], other=0.0)
    row_share = tl.load(earlier + begin + then, mask=inside, other=0.0)
    shares = row_share[:, None] - tl.load(total + begin + first)[None, :]
    allowed = inside[:, None] & (first[None, :] < chunk)
    if document is not None:
        row = (head // heads) * count * chunk + n * chunk
        mine = tl.load(document + row + then, mask=inside, other=-1)
        allowed &= mine[:, None] == tl.load(document + row + first)[None, :]
    taken = tl.load(erase + begin + then, mask=inside, other=0.0)
    A = (
        dot(after, tl.trans(before), none, "tf32", UPCAST)
        * taken[:, None]
        * tl.exp2(tl.where(allowed, shares, -10000.0))
    )
    place = inverses + ((head * count + n) * chunk + first[:, None]) * chunk + first[None, :]
    below = inverses + ((head * count + n) * chunk + then[:, None]) * chunk
    A = dot(A, tl.load(place), none, "tf32x3", UPCAST)
    late = tl.load(below + then[None, :], mask=inside[:, None] & inside[None, :], other=0.0)
    A = dot(late, A, none, "tf32x3", UPCAST)
    tl.store(below + first[None, :], -A, mask=inside[:, None])


@triton.jit
def apply_kernel(
    x,
    scale,
    inverses,
    out,
    count,
    chunk,
    width,
    C: tl.constexpr,
    V: tl.constexpr,
    TURNED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (N, tiles of the width, B H): an inverse, or its transpose, times (scale x); without inverses, scale x."""
    n, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tokens, columns = tl.arange(0, C), tl.program_id(1) * V + tl.arange(0, V)
    inside = tokens < chunk
    at = head * count * chunk + n * chunk + tokens
    mask = inside[:, None] & (columns[None, :] < width)
    spot = at[:, None] * width + columns[None, :]
    right = tl.load(x + spot, mask=mask, other=0.0)
    if scale is not None:
        factor = tl.load(scale + at, mask=inside, other=0.0)
        right = (factor[:, None] * right.to(tl.float32)).to(x.dtype.element_ty)
    if inverses is not None:
        first, then = tokens[:, None], tokens[None, :]
        if TURNED:
            first, then = tokens[None, :], tokens[:, None]
        place = ((head * count + n) * chunk + first) * chunk + then
        solve = tl.load(inverses + place, mask=inside[:, None] & inside[None, :], other=0.0).to(x.dtype.element_ty)
        done = dot(solve, right, tl.zeros((C, V), tl.float32), "tf32", UPCAST)
        tl.store(out + spot, done.to(x.dtype.element_ty), mask=mask)
    else:
        tl.store(out + spot, right, mask=mask)


@triton.jit
def states_kernel(
    k,
    scalars,
    ends,
    initial,
    state,
    anchor,
    fresh,
    states,
    writes,
    last,
    plane,
    heads,
    count,
    chunk,
    key_width,
    value_width,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HEARS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (V tiles, B H): the state before each chunk, each chunk's writes, and the state after the last."""
    head = tl.program_id(1).to(tl.int64)
    tokens, keys = tl.arange(0, C), tl.arange(0, K)
    values = tl.program_id(0) * V + tl.arange(0, V)
    inside, plane = tokens < chunk, tl.cast(plane, tl.int64)
    narrow: tl.constexpr = k.dtype.element_ty
    tile = values[:, None] * key_width + keys[None, :]
    tile_mask = (values[:, None] < value_width) & (keys[None, :] < key_width)
    key_mask = inside[:, None] & (keys[None, :] < key_width)
    mask = inside[:, None] & (values[None, :] < value_width)
    area = value_width * key_width
    now = tl.load(state + head * area + tile, mask=tile_mask, other=0.0)
    for n in range(0, count):
        at = head * count * chunk + n * chunk + tokens
        tl.store(states + (head * count + n) * area + tile, now.to(narrow), mask=tile_mask)
        key = tl.load(k + at[:, None] * key_width + keys[None, :], mask=key_mask, other=0.0)
        u = tl.load(fresh + at[:, None] * value_width + values[None, :], mask=mask, other=0.0).to(tl.float32)
        if HEARS:
            heard = tl.load(anchor + at[:, None] * key_width + keys[None, :], mask=key_mask, other=0.0)
            none = tl.zeros((C, V), tl.float32)
            u -= dot(heard, tl.trans(now.to(narrow)), none, "tf32", UPCAST)
        tl.store(writes + at[:, None] * value_width + values[None, :], u.to(narrow), mask=mask)
        after = tl.load(scalars + 6 * plane + at, mask=inside, other=0.0)
        now *= tl.load(ends + head * count + n)
        if DOCUMENTS:
            base = tl.load(ends + plane // chunk + head * count + n)
            now += base * tl.load(initial + (head % heads) * area + tile, mask=tile_mask, other=0.0)
        now = dot(tl.trans((after[:, None] * u).to(narrow)), key, now, "tf32", UPCAST)
    tl.store(last + head * area + tile, now, mask=tile_mask)


@triton.jit
def outputs_kernel(
    q,
    k,
    scalars,
    document,
    states,
    writes,
    out,
    plane,
    heads,
    count,
    chunk,
    key_width,
    value_width,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (N, V tiles, B H): share Q S^T + (through * Q K^T) u."""
    n, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tokens, keys = tl.arange(0, C), tl.arange(0, K)
    values = tl.program_id(1) * V + tl.arange(0, V)
    inside, plane = tokens < chunk, tl.cast(plane, tl.int64)
    narrow: tl.constexpr = k.dtype.element_ty
    at = head * count * chunk + n * chunk + tokens
    key_mask = inside[:, None] & (keys[None, :] < key_width)
    mask = inside[:, None] & (values[None, :] < value_width)
    query = tl.load(q + at[:, None] * key_width + keys[None, :], mask=key_mask, other=0.0)
    key = tl.load(k + at[:, None] * key_width + keys[None, :], mask=key_mask, other=0.0)
    total = tl.load(scalars + 4 * plane + at, mask=inside, other=0.0)
    row = (head // heads) * count * chunk + n * chunk
    through = share(total, total, tokens, inside, document, row, 0)
    scores = through * dot(query, tl.trans(key), tl.zeros((C, C), tl.float32), "tf32", UPCAST)
    tile = values[:, None] * key_width + keys[None, :]
    tile_mask = (values[:, None] < value_width) & (keys[None, :] < key_width)
    area = value_width * key_width
    now = tl.load(states + (head * count + n) * area + tile, mask=tile_mask, other=0.0)
    heard = dot(query, tl.trans(now), tl.zeros((C, V), tl.float32), "tf32", UPCAST)
    heard *= tl.load(scalars + 5 * plane + at, mask=inside, other=0.0)[:, None]
    u = tl.load(writes + at[:, None] * value_width + values[None, :], mask=mask, other=0.0)
    heard = dot(scores.to(narrow), u, heard, "tf32", UPCAST)
    tl.store(out + at[:, None] * value_width + values[None, :], heard.to(narrow), mask=mask)


def ready(given: Given) -> Given:
    """Contiguous, with documents counted in int32."""
    q, k, v, scalars, ends, initial, state = (
        x.contiguous() for x in (given.q, given.k, given.v, given.scalars, given.ends, given.initial, given.state)
    )
    document = None if given.document is None else given.document.int().contiguous()
    return Given(q, k, v, scalars, ends, document, initial, state, given.solves, given.hears)


def padded(size: int) -> int:
    """The side of a tile."""
    return max(16, int(triton.next_power_of_2(size)))


def sizes(given: Given) -> tuple[tuple[int, ...], dict[str, Any]]:
    """What every kernel is told of shapes: plane, heads, count, chunk, widths; and the padded tiles."""
    (B, H, T, width), count = given.k.shape, given.ends.shape[-1]
    chunk = T // count
    tiles = {"C": padded(chunk), "K": padded(width)}
    return (B * H * T, H, count, chunk, width, given.v.shape[-1]), {**tiles, "UPCAST": INTERPRET}


def config_for(kernel: str, configs: list[Config], asked: Config | None, like: Tensor) -> Config:
    """The one that is asked for, or was tuned for the width of `like`."""
    width = like.shape[-1]
    small = SMALL if INTERPRET or width < 32 else None
    return asked or small or chosen(kernel, configs, like.device, width=width)


class States(NamedTuple):
    """What backward finds again."""

    inverses: Tensor  # (B, H, N, C, C); empty where nothing is solved
    anchor: Tensor  # (B, H, T, K); empty where nothing is heard
    fresh: Tensor  # (B, H, T, V)
    states: Tensor  # (B, H, N, V, K)
    writes: Tensor  # (B, H, T, V)
    last: Tensor  # (B, H, V, K)


def inverses_of(
    k: Tensor, erase: Tensor, earlier: Tensor, total: Tensor, document_BT: Tensor | None, count: int
) -> Tensor:
    """(I + A)^-1 (B, H, N, C, C) of keys (B, H, T, K) in `count` chunks of 128 tokens or fewer."""
    B, H, T, width = k.shape
    chunk, blocks = T // count, -(-T // count // BLOCK)
    made = torch.empty if blocks == 1 else torch.zeros  # above two blocks stands nothing
    found = made(B, H, count, chunk, chunk, dtype=torch.float32, device=k.device)
    tiles = {"C": min(BLOCK, padded(chunk)), "K": padded(width), "UPCAST": INTERPRET}
    given = (k, erase, earlier, total, document_BT, found, H, count, chunk, width)
    invert_kernel[(count * blocks, B * H)](*given, blocks, **tiles, **INVERT.options())
    if blocks == 2:
        merge_kernel[(count, B * H)](*given, **tiles, **INVERT.options())
    return found


def for_chunk(config: Config, chunk: int) -> Config:
    """A wider chunk's inverse takes twice the warps: with fewer, its registers spill on sm_80."""
    return replace(config, warps=8) if chunk > BLOCK else config


def apply(
    x: Tensor, scale: Tensor | None, inverses: Tensor | None, out: Tensor, count: int, turned: bool, config: Config
) -> None:
    """apply_kernel of a tensor (B, H, T, V or K) in `count` chunks."""
    B, H, T, width = x.shape
    grid = (count, triton.cdiv(width, config.tiles["V"]), B * H)
    chunk = padded(T // count)
    constants = {"C": chunk, "TURNED": turned, "UPCAST": INTERPRET, **for_chunk(config, chunk).options()}
    apply_kernel[grid](x, scale, inverses, out, count, T // count, width, **constants)


def states_of(given: Given, configs: tuple[Config | None, Config | None] = (None, None)) -> States:
    """By three kernels or, where nothing is solved, two."""
    shapes, tiles = sizes(given)
    k, v, (_, _, count, _, width, values) = given.k, given.v, shapes
    B, H = k.shape[:2]
    scalars, inverses = given.scalars, k.new_empty(0, dtype=torch.float32)
    if given.solves:
        inverses = inverses_of(k, scalars[0], scalars[3], scalars[4], given.document, count)
    anchor = k.new_empty(k.shape if given.hears else (0,))
    states, last = k.new_empty(B, H, count, values, width), torch.empty_like(given.state)
    found = States(inverses, anchor, torch.empty_like(v), states, torch.empty_like(v), last)
    tiles["HEARS"] = given.hears
    known = inverses if given.solves else None
    config = config_for("matrix_memory.apply", APPLY, configs[0], given.v)
    apply(v, scalars[1], known, found.fresh, count, False, config)
    if given.hears:
        apply(k, scalars[2], known, found.anchor, count, False, config)
    config = config_for("matrix_memory.states", STATES, configs[1], given.v)
    grid = (triton.cdiv(values, config.tiles["V"]), B * H)
    options = {**tiles, **config.options(), "DOCUMENTS": given.document is not None}
    states_kernel[grid](k, scalars, given.ends, given.initial, given.state, *found[1:], *shapes, **options)
    return found


def matrix_memory(
    given: Given, configs: tuple[Config | None, Config | None, Config | None] = (None, None, None)
) -> tuple[Tensor, Tensor]:
    """As reference.matrix_memory; without configs, by those that were tuned for the width."""
    given = ready(given)
    found, (shapes, tiles) = states_of(given, configs[:2]), sizes(given)
    out, config = torch.empty_like(given.v), config_for("matrix_memory.outputs", OUTPUTS, configs[2], given.v)
    grid = (shapes[2], triton.cdiv(shapes[5], config.tiles["V"]), given.k.shape[0] * given.k.shape[1])
    arguments = (given.q, given.k, given.scalars, given.document, found.states, found.writes, out, *shapes)
    outputs_kernel[grid](*arguments, **tiles, **config.options())
    return out, found.last


def launches() -> list[Launch]:
    """What is compiled ahead of time: the delta rule with documents, heads of 64 in bfloat16 and of 128 in float32."""
    from nlscale_kernels.linear_memory import triton_backward

    return [*forward_launches(), *triton_backward.launches()]


def shapes_of(width: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes of 4 rows of 4096 tokens, 16 heads, chunks of 64."""
    return (4 * 16 * 4096, 16, 64, 64, width, width), {"C": 64, "K": width, "UPCAST": False, "HEARS": True}


SORTS = ((torch.bfloat16, 64), (torch.float32, 128))  # least and most registers and shared memory


def forward_launches() -> list[Launch]:
    """Of the three kernels."""
    wide, found = torch.float32, []
    for narrow, width in SORTS:
        name = f"{str(narrow)[6:]} {width}"
        shapes, tiles = shapes_of(width)
        given = (narrow, wide, wide, wide, torch.int32, wide, *shapes[1:5])
        constants = {key: value for key, value in tiles.items() if key != "HEARS"}
        for kernel, arguments in ((invert_kernel, (*given, 2)), (merge_kernel, given)):
            short = kernel.__name__.removesuffix("_kernel")
            found.append(Launch(f"{short} {name}", kernel, arguments, constants, [INVERT], product=True, spills=1024))
        for turned, chunk in itertools.product((False, True), (64, 128)):
            given = (narrow, None if turned else wide, wide, narrow, shapes[2], chunk, width)
            constants = {"C": chunk, "TURNED": turned, "UPCAST": False}
            way, configs = f"apply {chunk}{' turned' * turned} {name}", [for_chunk(each, chunk) for each in APPLY]
            found.append(Launch(way, apply_kernel, given, constants, configs, product=True, spills=128))
        given = (narrow, wide, wide, wide, wide, narrow, narrow, narrow, narrow, wide, *shapes)
        constants = {**tiles, "DOCUMENTS": True}
        found.append(Launch(f"states {name}", states_kernel, given, constants, STATES, product=True))
        given = (narrow, narrow, wide, torch.int32, narrow, narrow, narrow, *shapes)
        constants = {key: value for key, value in tiles.items() if key != "HEARS"}
        found.append(Launch(f"outputs {name}", outputs_kernel, given, constants, OUTPUTS, product=True, spills=512))
    return found
