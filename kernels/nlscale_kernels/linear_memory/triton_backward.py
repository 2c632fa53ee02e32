"""Backward: forward's states again, their gradients from the last chunk to the first, then what tokens and scalars get."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlscale_kernels.linear_memory.reference import Given
from nlscale_kernels.linear_memory.triton import (
    APPLY,
    SORTS,
    apply,
    config_for,
    ready,
    shapes_of,
    share,
    sizes,
    states_of,
)
from nlscale_kernels.triton_build import Config, Launch, dot

LN2 = tl.constexpr(0.6931471805599453)
CARRY = [Config({"V": 16}, warps=8, stages=1), Config({"V": 16}, warps=4, stages=1)]
READ = [Config({"V": 16}, warps=8, stages=1), Config({"V": 32}, warps=8, stages=1, least=90)]
SPREAD = [Config({"V": 32}, warps=4, stages=1), Config({"V": 64}, warps=8, stages=1, least=90)]
LISTEN = [Config({"V": 64}, warps=4, stages=1), Config({"V": 32}, warps=4, stages=1)]


@triton.jit
def listen_kernel(
    q,
    k,
    scalars,
    document,
    d_o,
    d_writes,
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
    """Grid (N, V tiles, B H): what writes get from readings in their own chunk, (through * Q K^T)^T d_o."""
    n, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tokens, keys = tl.arange(0, C), tl.arange(0, K)
    values = tl.program_id(1) * V + tl.arange(0, V)
    inside, plane = tokens < chunk, tl.cast(plane, tl.int64)
    narrow: tl.constexpr = k.dtype.element_ty
    at = head * count * chunk + n * chunk + tokens
    key_mask = inside[:, None] & (keys[None, :] < key_width)
    spot = at[:, None] * value_width + values[None, :]
    mask = inside[:, None] & (values[None, :] < value_width)
    query = tl.load(q + at[:, None] * key_width + keys[None, :], mask=key_mask, other=0.0)
    key = tl.load(k + at[:, None] * key_width + keys[None, :], mask=key_mask, other=0.0)
    total = tl.load(scalars + 4 * plane + at, mask=inside, other=0.0)
    row = (head // heads) * count * chunk + n * chunk
    through = share(total, total, tokens, inside, document, row, 0)
    scores = through * dot(query, tl.trans(key), tl.zeros((C, C), tl.float32), "tf32", UPCAST)
    of = tl.load(d_o + spot, mask=mask, other=0.0)
    turned_u = dot(tl.trans(of), scores.to(narrow), tl.zeros((V, C), tl.float32), "tf32", UPCAST)
    tl.store(d_writes + spot, tl.trans(turned_u).to(narrow), mask=mask)


@triton.jit
def carry_kernel(
    q,
    k,
    scalars,
    ends,
    anchor,
    d_o,
    d_last,
    d_states,
    d_writes,
    d_state,
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
    UPCAST: tl.constexpr,
):
    """Grid (V tiles, B H): gradients of the state after each chunk, of its writes, of the state before the first."""
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
    later = tl.load(d_last + head * area + tile, mask=tile_mask, other=0.0)
    for place in range(0, count):
        n = count - 1 - place
        at = head * count * chunk + n * chunk + tokens
        spot = at[:, None] * value_width + values[None, :]
        where = at[:, None] * key_width + keys[None, :]
        tl.store(d_states + (head * count + n) * area + tile, later.to(narrow), mask=tile_mask)
        key = tl.load(k + where, mask=key_mask, other=0.0)
        after = tl.load(scalars + 6 * plane + at, mask=inside, other=0.0)
        arrived = dot(key, tl.trans(later.to(narrow)), tl.zeros((C, V), tl.float32), "tf32", UPCAST)
        u = tl.load(d_writes + spot, mask=mask, other=0.0).to(tl.float32) + after[:, None] * arrived
        tl.store(d_writes + spot, u.to(narrow), mask=mask)
        later *= tl.load(ends + head * count + n)
        reads = tl.load(scalars + 5 * plane + at, mask=inside, other=0.0)
        of = tl.load(d_o + spot, mask=mask, other=0.0)
        query = tl.load(q + where, mask=key_mask, other=0.0)
        shared = (reads[:, None] * of.to(tl.float32)).to(narrow)
        later = dot(tl.trans(shared), query, later, "tf32", UPCAST)
        if HEARS:
            heard = tl.load(anchor + where, mask=key_mask, other=0.0)
            later = dot(tl.trans((-u).to(narrow)), heard, later, "tf32", UPCAST)
    tl.store(d_state + head * area + tile, later, mask=tile_mask)


@triton.jit
def read_kernel(
    q,
    k,
    scalars,
    initial,
    document,
    states,
    writes,
    d_o,
    d_states,
    d_writes,
    d_q,
    d_key,
    d_anchor,
    d_scalars,
    d_ends,
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
    UPCAST: tl.constexpr,
):
    """Grid (N, B H): what comes through readings and through the state at the chunk's end."""
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens, keys = tl.arange(0, C), tl.arange(0, K)
    inside, plane = tokens < chunk, tl.cast(plane, tl.int64)
    narrow: tl.constexpr = k.dtype.element_ty
    at = head * count * chunk + n * chunk + tokens
    key_mask = inside[:, None] & (keys[None, :] < key_width)
    where = at[:, None] * key_width + keys[None, :]
    area = value_width * key_width
    asked, arrived, back = (tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32))
    d_scores = tl.zeros((C, C), tl.float32)
    d_whole, d_base = 0.0, 0.0
    for first in range(0, value_width, V):
        values = first + tl.arange(0, V)
        tile = values[:, None] * key_width + keys[None, :]
        tile_mask = (values[:, None] < value_width) & (keys[None, :] < key_width)
        mask = inside[:, None] & (values[None, :] < value_width)
        now = tl.load(states + (head * count + n) * area + tile, mask=tile_mask, other=0.0)
        later = tl.load(d_states + (head * count + n) * area + tile, mask=tile_mask, other=0.0)
        of = tl.load(d_o + at[:, None] * value_width + values[None, :], mask=mask, other=0.0)
        u = tl.load(writes + at[:, None] * value_width + values[None, :], mask=mask, other=0.0)
        d_scores = dot(of, tl.trans(u), d_scores, "tf32", UPCAST)
        asked = dot(of, now, asked, "tf32", UPCAST)
        arrived = dot(u, later, arrived, "tf32", UPCAST)
        if HEARS:
            d_u = tl.load(d_writes + at[:, None] * value_width + values[None, :], mask=mask, other=0.0)
            back = dot(d_u, now, back, "tf32", UPCAST)
        d_whole += tl.sum(now.to(tl.float32) * later.to(tl.float32))
        if document is not None:
            begin = tl.load(initial + (head % heads) * area + tile, mask=tile_mask, other=0.0)
            d_base += tl.sum(begin * later.to(tl.float32))
    tl.store(d_ends + head * count + n, d_whole)
    if document is not None:
        tl.store(d_ends + plane // chunk + head * count + n, d_base)
    if HEARS:
        tl.store(d_anchor + where, (-back).to(narrow), mask=key_mask)
    query = tl.load(q + where, mask=key_mask, other=0.0)
    key = tl.load(k + where, mask=key_mask, other=0.0)
    reads = tl.load(scalars + 5 * plane + at, mask=inside, other=0.0)
    after = tl.load(scalars + 6 * plane + at, mask=inside, other=0.0)
    tl.store(d_scalars + 5 * plane + at, tl.sum(query.to(tl.float32) * asked, 1), mask=inside)
    tl.store(d_scalars + 6 * plane + at, tl.sum(key.to(tl.float32) * arrived, 1), mask=inside)
    total = tl.load(scalars + 4 * plane + at, mask=inside, other=0.0)
    row = (head // heads) * count * chunk + n * chunk
    through = share(total, total, tokens, inside, document, row, 0)
    products = dot(query, tl.trans(key), tl.zeros((C, C), tl.float32), "tf32", UPCAST)
    turned = d_scores * through
    of_products = turned.to(narrow)
    turned *= products
    d_total = (tl.sum(turned, 1) - tl.sum(turned, 0)) * LN2
    tl.store(d_scalars + 4 * plane + at, d_total, mask=inside)
    turned_told = dot(tl.trans(query), of_products, tl.zeros((K, C), tl.float32), "tf32", UPCAST)
    tl.store(d_key + where, after[:, None] * arrived + tl.trans(turned_told), mask=key_mask)
    told = dot(of_products, key, reads[:, None] * asked, "tf32", UPCAST)
    tl.store(d_q + where, told.to(narrow), mask=key_mask)


@triton.jit
def spread_kernel(
    k,
    v,
    scalars,
    document,
    anchor,
    fresh,
    d_anchor,
    d_fresh,
    d_key,
    d_k,
    d_v,
    d_scalars,
    plane,
    heads,
    count,
    chunk,
    key_width,
    value_width,
    C: tl.constexpr,
    V: tl.constexpr,
    SOLVES: tl.constexpr,
    HEARS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (N, B H): from the gradients of both right hand sides to values, rates, keys and the shares in A."""
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = tl.arange(0, C)
    inside, plane = tokens < chunk, tl.cast(plane, tl.int64)
    narrow: tl.constexpr = k.dtype.element_ty
    at = head * count * chunk + n * chunk + tokens
    rate = tl.load(scalars + plane + at, mask=inside, other=0.0)
    hears = tl.load(scalars + 2 * plane + at, mask=inside, other=0.0)
    d_matrix, products = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    d_rate, d_hears = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for first in range(0, value_width, V):
        values = first + tl.arange(0, V)
        mask = inside[:, None] & (values[None, :] < value_width)
        spot = at[:, None] * value_width + values[None, :]
        d_right = tl.load(d_fresh + spot, mask=mask, other=0.0)
        if SOLVES:
            right = tl.load(fresh + spot, mask=mask, other=0.0)
            d_matrix = dot(d_right, tl.trans(right), d_matrix, "tf32", UPCAST)
        wide = d_right.to(tl.float32)
        d_rate += tl.sum(wide * tl.load(v + spot, mask=mask, other=0.0).to(tl.float32), 1)
        tl.store(d_v + spot, (rate[:, None] * wide).to(narrow), mask=mask)
    tl.store(d_scalars + plane + at, d_rate, mask=inside)
    for first in range(0, key_width, V):
        keys = first + tl.arange(0, V)
        mask = inside[:, None] & (keys[None, :] < key_width)
        spot = at[:, None] * key_width + keys[None, :]
        key = tl.load(k + spot, mask=mask, other=0.0)
        if SOLVES:
            products = dot(key, tl.trans(key), products, "tf32", UPCAST)
        if HEARS:
            d_right = tl.load(d_anchor + spot, mask=mask, other=0.0)
            if SOLVES:
                right = tl.load(anchor + spot, mask=mask, other=0.0)
                d_matrix = dot(d_right, tl.trans(right), d_matrix, "tf32", UPCAST)
            d_hears += tl.sum(d_right.to(tl.float32) * key.to(tl.float32), 1)
    if HEARS:
        tl.store(d_scalars + 2 * plane + at, d_hears, mask=inside)
    if SOLVES:
        erase = tl.load(scalars + at, mask=inside, other=0.0)
        earlier = tl.load(scalars + 3 * plane + at, mask=inside, other=0.0)
        total = tl.load(scalars + 4 * plane + at, mask=inside, other=0.0)
        row = (head // heads) * count * chunk + n * chunk
        d_matrix *= -share(earlier, total, tokens, inside, document, row, -1)
        turned = d_matrix * products
        tl.store(d_scalars + at, tl.sum(turned, 1), mask=inside)
        turned *= erase[:, None]
        tl.store(d_scalars + 3 * plane + at, tl.sum(turned, 1) * LN2, mask=inside)
        d_total = tl.load(d_scalars + 4 * plane + at, mask=inside, other=0.0) - tl.sum(turned, 0) * LN2
        tl.store(d_scalars + 4 * plane + at, d_total, mask=inside)
        d_matrix *= erase[:, None]
    of_products = (d_matrix + tl.trans(d_matrix)).to(narrow)  # a key is on both sides of the products
    for first in range(0, key_width, V):
        keys = first + tl.arange(0, V)
        mask = inside[:, None] & (keys[None, :] < key_width)
        spot = at[:, None] * key_width + keys[None, :]
        told = tl.load(d_key + spot, mask=mask, other=0.0)
        if HEARS:
            told += hears[:, None] * tl.load(d_anchor + spot, mask=mask, other=0.0).to(tl.float32)
        if SOLVES:
            key = tl.load(k + spot, mask=mask, other=0.0)
            told = dot(of_products, key, told, "tf32", UPCAST)
        tl.store(d_k + spot, told.to(narrow), mask=mask)


def gradients(
    given: Given, d_o: Tensor, d_last: Tensor, configs: Sequence[Config | None] = (None,) * 5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As reference.gradients; without configs, by those that were tuned for the width."""
    given, d_o, d_last = ready(given), d_o.contiguous(), d_last.contiguous()
    q, k, v, scalars, ends, document, initial, state, solves, hears = given
    (inverses, anchor, fresh, states, writes, _), (shapes, tiles) = states_of(given), sizes(given)
    rows, tiles["HEARS"] = k.shape[0] * k.shape[1], hears
    d_q, d_k, d_v, d_state, d_writes, d_states, d_anchor = (
        torch.empty_like(x) for x in (q, k, v, state, v, states, anchor)
    )
    d_key = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    d_scalars, d_ends, d_initial = (torch.zeros_like(x) for x in (scalars, ends, initial))
    config = config_for("matrix_memory.listen", LISTEN, configs[0], given.v)
    per_value = {**tiles, "K": tiles["K"], **config.options()}
    del per_value["HEARS"]
    grid = (shapes[2], triton.cdiv(shapes[5], config.tiles["V"]), rows)
    listen_kernel[grid](q, k, scalars, document, d_o, d_writes, *shapes, **per_value)
    config = config_for("matrix_memory.carry", CARRY, configs[1], given.v)
    arguments = (q, k, scalars, ends, anchor, d_o, d_last, d_states, d_writes, d_state, *shapes)
    carry_kernel[(triton.cdiv(shapes[5], config.tiles["V"]), rows)](*arguments, **tiles, **config.options())
    config = config_for("matrix_memory.read", READ, configs[2], given.v)
    arguments = (q, k, scalars, initial, document, states, writes, d_o, d_states, d_writes)
    arguments += (d_q, d_key, d_anchor, d_scalars, d_ends, *shapes)
    read_kernel[(shapes[2], rows)](*arguments, **tiles, **config.options())
    d_fresh = d_writes
    if solves:
        d_fresh, of_anchor = torch.empty_like(d_writes), d_anchor
        config = config_for("matrix_memory.apply", APPLY, configs[4], given.v)
        apply(d_writes, None, inverses, d_fresh, shapes[2], True, config)
        if hears:
            d_anchor = torch.empty_like(of_anchor)
            apply(of_anchor, None, inverses, d_anchor, shapes[2], True, config)
    config = config_for("matrix_memory.spread", SPREAD, configs[3], given.v)
    arguments = (k, v, scalars, document, anchor, fresh, d_anchor, d_fresh, d_key, d_k, d_v, d_scalars, *shapes)
    del tiles["K"]
    spread_kernel[(shapes[2], rows)](*arguments, SOLVES=solves, **tiles, **config.options())
    if document is not None:
        d_initial = torch.einsum("bhn,bhnvk->hvk", ends[1], d_states.float())
    return d_q, d_k, d_v, d_scalars, d_ends, d_initial, d_state


def launches() -> list[Launch]:
    """What is compiled ahead of time."""
    wide, found = torch.float32, []
    for narrow, width in SORTS:
        name = f"{str(narrow)[6:]} {width}"
        shapes, tiles = shapes_of(width)
        given = (narrow, narrow, wide, torch.int32, narrow, narrow, *shapes)
        constants = {key: value for key, value in tiles.items() if key != "HEARS"}
        found.append(Launch(f"listen {name}", listen_kernel, given, constants, LISTEN, product=True))
        given = (narrow, narrow, wide, wide, *[narrow] * 2, wide, *[narrow] * 2, wide, *shapes)
        found.append(Launch(f"carry {name}", carry_kernel, given, tiles, CARRY, product=True))
        given = (narrow, narrow, wide, wide, torch.int32, *[narrow] * 6, wide, narrow, wide, wide, *shapes)
        found.append(Launch(f"read {name}", read_kernel, given, tiles, READ, product=True, spills=2560))
        given = (narrow, narrow, wide, torch.int32, *[narrow] * 4, wide, narrow, narrow, wide, *shapes)
        constants = {key: value for key, value in tiles.items() if key != "K"} | {"SOLVES": True}
        found.append(Launch(f"spread {name}", spread_kernel, given, constants, SPREAD, product=True, spills=64))
    return found
