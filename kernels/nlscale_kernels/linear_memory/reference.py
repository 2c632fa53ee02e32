"""The chunk form of every matrix memory whose writes are rank one a token, and its gradients written out (README.md).

With a chunk's anchor S (V, K) and its tokens' shares as diagonal matrices,

    A = erase (between * K K^T), strictly lower      u = (I + A)^-1 (rate V - hears K S^T)
    o = share Q S^T + (through * Q K^T) u            S <- whole S + base initial + (after u)^T K

`erase`, `rate`, `hears`, `share`, `after` say which rule it is (memory.py). `between` and `through` are
2^(earlier_t - total_i) for i < t and 2^(total_t - total_i) for i <= t, of tokens of one document.

B rows, H heads, T tokens, N chunks of C tokens, K key width, V value width, S scalars a token, E a chunk.
"""

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.span import between

LN2 = log(2)


class Scalars(NamedTuple):
    """A token's, in the order in which they are stacked: (S, B, H, T)."""

    erase: Tensor  # how much of what the memory says to its key a token takes away when it comes
    rate: Tensor  # how much of its value it writes
    hears: Tensor  # how much of what the chunk's anchor says to its key it takes away
    earlier: Tensor  # log2 of the share left before it, counted from the chunk's begin
    total: Tensor  # the same with its own share
    share: Tensor  # how much its query hears of the anchor
    after: Tensor  # how much of its write is there at the chunk's end


class Given(NamedTuple):
    """What the operator is given."""

    q: Tensor  # (B, H, T, K)
    k: Tensor  # (B, H, T, K)
    v: Tensor  # (B, H, T, V)
    scalars: Tensor  # (S, B, H, T)
    ends: Tensor  # (2, B, H, N): whole and base of each chunk
    document: Tensor | None  # (B, T): numbers that differ between the documents of a chunk; None: one document
    initial: Tensor  # (H, V, K)
    state: Tensor  # (B, H, V, K)
    solves: bool  # false: erase is zero
    hears: bool  # false: hears is zero


class Chunks(NamedTuple):
    """The same by chunks (B, H, N, C, .), scalars as diagonal matrices, and what follows without any state."""

    q: Tensor
    k: Tensor
    v: Tensor
    at: Scalars
    whole: Tensor  # (B, H, N, 1, 1)
    base: Tensor
    between: Tensor  # (C, C)
    products: Tensor  # between * K K^T
    scores: Tensor  # through * Q K^T
    through: Tensor
    anchor: Tensor  # (I + A)^-1 hears K: what the anchor's columns are multiplied by
    fresh: Tensor  # (I + A)^-1 rate V


def cut(x: Tensor, like: Tensor) -> Tensor:
    """(B, H, T, ...) as (B, H, N, C, ...); `like`: ends."""
    return x.unflatten(2, (like.shape[-1], -1))


def chunks_of(given: Given) -> Chunks:
    """Of all chunks at once."""
    q, k, v = (cut(x, given.ends) for x in given[:3])
    at = Scalars(*given.scalars.unflatten(-1, k.shape[2:4]).unsqueeze(-1).unbind(0))
    whole, base = given.ends[..., None, None].unbind(0)
    document = None if given.document is None else given.document.unflatten(-1, k.shape[2:4])
    total, earlier = at.total.squeeze(-1), at.earlier.squeeze(-1)
    through = between(total, total, document, 0)
    scores, anchor, fresh = through * (q @ k.mT), at.hears * k, at.rate * v
    if not given.solves:
        return Chunks(q, k, v, at, whole, base, through, scores, scores, through, anchor, fresh)
    before = between(earlier, total, document, -1)
    products = before * (k @ k.mT)
    right = torch.cat([anchor, fresh], -1)
    solved = torch.linalg.solve_triangular(at.erase * products, right, upper=False, unitriangular=True)
    anchor, fresh = solved.split([k.shape[-1], v.shape[-1]], -1)
    return Chunks(q, k, v, at, whole, base, before, products, scores, through, anchor, fresh)


def states_of(given: Given, c: Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """The states before each chunk (B, H, N, V, K), the writes u (B, H, N, C, V), the state after the last chunk."""
    state, states, writes = given.state, [], []
    for n in range(c.k.shape[2]):
        u = c.fresh[:, :, n] - c.anchor[:, :, n] @ state.mT if given.hears else c.fresh[:, :, n]
        states.append(state)
        writes.append(u)
        state = c.whole[:, :, n] * state + (c.at.after[:, :, n] * u).mT @ c.k[:, :, n]
        state = state if given.document is None else state + c.base[:, :, n] * given.initial
    return torch.stack(states, 2), torch.stack(writes, 2), state


def matrix_memory(given: Given) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, V) and the state (B, H, V, K) after the last token."""
    c = chunks_of(given)
    states, u, last = states_of(given, c)
    return (c.at.share * (c.q @ states.mT) + c.scores @ u).flatten(2, 3), last


class Gradients(NamedTuple):
    """Of the inputs, in their order."""

    q: Tensor
    k: Tensor
    v: Tensor
    scalars: Tensor
    ends: Tensor
    initial: Tensor
    state: Tensor


def carried(given: Given, c: Chunks, d_o: Tensor, d_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the state after each chunk, of the writes, of the state before the first chunk."""
    count = c.k.shape[2]
    d_state, d_states, d_writes = d_last, [d_last] * count, [d_last] * count
    read, shared = c.scores.mT @ d_o, c.at.share * d_o
    for n in reversed(range(count)):
        d_states[n] = d_state
        d_writes[n] = read[:, :, n] + c.at.after[:, :, n] * (c.k[:, :, n] @ d_state.mT)
        d_state = c.whole[:, :, n] * d_state + shared[:, :, n].mT @ c.q[:, :, n]
        d_state = d_state - d_writes[n].mT @ c.anchor[:, :, n] if given.hears else d_state
    return torch.stack(d_states, 2), torch.stack(d_writes, 2), d_state


def solved(given: Given, c: Chunks, d_anchor: Tensor, d_fresh: Tensor) -> tuple[Tensor, Tensor, Scalars]:
    """Gradients of keys, values and scalars from those of (I + A)^-1 hears K and (I + A)^-1 rate V."""
    none = torch.zeros_like(c.at.rate)
    d_erase = d_hears = d_earlier = d_total = none
    if given.solves:
        right, matrix = torch.cat([d_anchor, d_fresh], -1), c.at.erase * c.products
        right = torch.linalg.solve_triangular(matrix.mT, right, upper=True, unitriangular=True)
        d_anchor, d_fresh = right.split([c.k.shape[-1], c.v.shape[-1]], -1)
    d_k = torch.zeros_like(c.k)
    if given.hears:
        d_k, d_hears = c.at.hears * d_anchor, (d_anchor * c.k).sum(-1, keepdim=True)
    if given.solves:
        d_matrix = -(d_anchor @ c.anchor.mT + d_fresh @ c.fresh.mT)  # of A; products are zero above its diagonal
        turned = d_matrix * c.products
        d_erase, turned = turned.sum(-1, keepdim=True), turned * c.at.erase
        d_earlier, d_total = LN2 * turned.sum(-1, keepdim=True), -LN2 * turned.sum(-2).unsqueeze(-1)
        d_products = d_matrix * c.between * c.at.erase
        d_k = d_k + d_products @ c.k + d_products.mT @ c.k
    d_rate = (d_fresh * c.v).sum(-1, keepdim=True)
    return d_k, c.at.rate * d_fresh, Scalars(d_erase, d_rate, d_hears, d_earlier, d_total, none, none)


def gradients(given: Given, d_o: Tensor, d_last: Tensor) -> Gradients:
    """From the gradients of outputs and of the last state; nothing but what was given was kept."""
    c, d_o = chunks_of(given), cut(d_o, given.ends)
    states, u, _ = states_of(given, c)
    ends, d_u, d_state = carried(given, c, d_o, d_last)
    asked, arrived, d_scores = d_o @ states, u @ ends, d_o @ u.mT
    d_products, turned = d_scores * c.through, d_scores * c.scores
    d_k, d_v, at = solved(given, c, -(d_u @ states), d_u)
    d_q = c.at.share * asked + d_products @ c.k
    d_k = d_k + d_products.mT @ c.q + c.at.after * arrived
    at = at._replace(
        total=at.total + LN2 * (turned.sum(-1) - turned.sum(-2)).unsqueeze(-1),
        share=(c.q * asked).sum(-1, keepdim=True),
        after=(c.k * arrived).sum(-1, keepdim=True),
    )
    d_whole = (ends * states).sum((-2, -1))
    d_base, d_initial = torch.zeros_like(d_whole), torch.zeros_like(given.initial)
    if given.document is not None:
        d_base, d_initial = (ends * given.initial.unsqueeze(1)).sum((-2, -1)), (c.base * ends).sum((0, 2))
    d_q, d_k, d_v = (x.flatten(2, 3) for x in (d_q, d_k, d_v))
    return Gradients(d_q, d_k, d_v, torch.stack(at).flatten(3), torch.stack([d_whole, d_base]), d_initial, d_state)
