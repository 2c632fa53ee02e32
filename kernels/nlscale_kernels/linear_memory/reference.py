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
    A: Tensor  # erase products
    through: Tensor
    scores: Tensor  # through * Q K^T


def cut(x: Tensor, like: Tensor) -> Tensor:
    """(B, H, T, ...) as (B, H, N, C, ...); `like`: ends."""
    return x.unflatten(2, (like.shape[-1], -1))


def chunks_of(given: Given) -> Chunks:
    """Of all chunks at once, in the scalars' dtype."""
    q, k, v = (cut(x.to(given.scalars.dtype), given.ends) for x in given[:3])
    at = Scalars(*given.scalars.unflatten(-1, k.shape[2:4]).unsqueeze(-1).unbind(0))
    whole, base = given.ends[..., None, None].unbind(0)
    document = None if given.document is None else given.document.unflatten(-1, k.shape[2:4])
    total, earlier = at.total.squeeze(-1), at.earlier.squeeze(-1)
    through = between(total, total, document, 0)
    scores = through * (q @ k.mT)
    if not given.solves:
        return Chunks(q, k, v, at, whole, base, through, through, through, through, scores)
    before = between(earlier, total, document, -1)
    products = before * (k @ k.mT)
    return Chunks(q, k, v, at, whole, base, before, products, at.erase * products, through, scores)


def states_of(given: Given, c: Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """The states before each chunk (B, H, N, V, K), the writes u (B, H, N, C, V), the state after the last chunk."""
    state, states, writes = given.state, [], []
    kept, hears, fresh = c.at.after * c.k, c.at.hears * c.k, c.at.rate * c.v
    for n in range(c.k.shape[2]):
        u = fresh[:, :, n] - hears[:, :, n] @ state.mT if given.hears else fresh[:, :, n]
        if given.solves:
            u = torch.linalg.solve_triangular(c.A[:, :, n], u, upper=False, unitriangular=True)
        states.append(state)
        writes.append(u)
        state = c.whole[:, :, n] * state + u.mT @ kept[:, :, n]
        state = state if given.document is None else state + c.base[:, :, n] * given.initial
    return torch.stack(states, 2), torch.stack(writes, 2), state


def matrix_memory(given: Given) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, V) and the state (B, H, V, K) after the last token."""
    c = chunks_of(given)
    states, u, last = states_of(given, c)
    o = c.at.share * (c.q @ states.mT) + c.scores @ u
    return o.flatten(2, 3).to(given.v.dtype), last


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
    """Gradients of the state after each chunk, of (I + A) u, of the state before the first chunk."""
    count = c.k.shape[2]
    d_state, d_states, d_rights = d_last, [d_last] * count, [d_last] * count
    read, kept, hears = c.scores.mT @ d_o, c.at.after * c.k, c.at.hears * c.k
    asked = (c.at.share * d_o).mT @ c.q
    for n in reversed(range(count)):
        right = read[:, :, n] + kept[:, :, n] @ d_state.mT
        if given.solves:
            right = torch.linalg.solve_triangular(c.A[:, :, n].mT, right, upper=True, unitriangular=True)
        d_states[n], d_rights[n] = d_state, right
        d_state = c.whole[:, :, n] * d_state + asked[:, :, n]
        d_state = d_state - right.mT @ hears[:, :, n] if given.hears else d_state
    return torch.stack(d_states, 2), torch.stack(d_rights, 2), d_state


def solved(given: Given, c: Chunks, u: Tensor, states: Tensor, d_right: Tensor) -> tuple[Tensor, Tensor, Scalars]:
    """Gradients of keys, values and scalars from that of (I + A) u = rate V - hears K S^T."""
    none = torch.zeros_like(c.at.rate)
    d_erase = d_hears = d_earlier = d_total = none
    d_k = torch.zeros_like(c.k)
    if given.hears:
        of_key = d_right @ states
        d_k, d_hears = -c.at.hears * of_key, -(of_key * c.k).sum(-1, keepdim=True)
    if given.solves:
        d_A = -d_right @ u.mT  # products are zero above the diagonal
        turned = d_A * c.products
        d_erase, turned = turned.sum(-1, keepdim=True), turned * c.at.erase
        d_earlier, d_total = LN2 * turned.sum(-1, keepdim=True), -LN2 * turned.sum(-2).unsqueeze(-1)
        d_products = d_A * c.between * c.at.erase
        d_k = d_k + (d_products + d_products.mT) @ c.k
    d_rate = (d_right * c.v).sum(-1, keepdim=True)
    return d_k, c.at.rate * d_right, Scalars(d_erase, d_rate, d_hears, d_earlier, d_total, none, none)


def gradients(given: Given, d_o: Tensor, d_last: Tensor) -> Gradients:
    """From the gradients of outputs and of the last state; nothing but what was given was kept."""
    c, d_o = chunks_of(given), cut(d_o.to(given.scalars.dtype), given.ends)
    states, u, _ = states_of(given, c)
    ends, d_right, d_state = carried(given, c, d_o, d_last)
    asked, arrived, d_scores = d_o @ states, u @ ends, d_o @ u.mT
    d_products, turned = d_scores * c.through, d_scores * c.scores
    d_k, d_v, at = solved(given, c, u, states, d_right)
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
    d_q, d_k, d_v = (x.flatten(2, 3).to(given.k.dtype) for x in (d_q, d_k, d_v))
    return Gradients(d_q, d_k, d_v, torch.stack(at).flatten(3), torch.stack([d_whole, d_base]), d_initial, d_state)
