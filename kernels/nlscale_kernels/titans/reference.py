"""Titans' long-term memory: gradient steps with momentum and forgetting, by chunks (Titans, 2501.00663; spec 2.9).

    S_t = c_t S_{t-1} - e_t grad |M(k_t) - v_t|^2 / 2       c_t momentum, e_t rate
    M_t = a_t M_{t-1} + S_t                                 a_t the share kept: 1 - alpha_t of the paper

Gradients of a chunk are taken at its anchor (the state before it; eq. 16), so the state after it is a weighted sum of
them, and no token's state is ever made. Tokens of a chunk read the anchor: what a token reads was written before the
chunk. A document that begins inside a chunk reads, and is written into, the initial state.

B rows, H heads, T tokens, C tokens of a chunk, K head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.mlp_memory import Bank, Reading, Slope, first_layer, mix, read, second_layer, slope
from nlscale_kernels.span import Span, anchored, filtered, span_of


class Tokens(NamedTuple):
    """What a run of tokens brings: (B, H, T, K) and gates (B, H, T), starts (B, T) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    log_momentum: Tensor
    log_keep: Tensor
    starts: Tensor | None = None


class Memory(NamedTuple):
    """Weights and momentum."""

    bank: Bank
    momentum: Bank


def begin(initial: Bank) -> Memory:
    """The memory before any token; `initial` has a row dimension of 1."""
    return Memory(initial, Bank(*(torch.zeros_like(part) for part in initial)))


def renew(fresh: Tensor | None, initial: Bank, bank: Bank) -> Bank:
    """The initial weights in rows where a document began."""
    return Bank(*(anchored(fresh, first, part) for first, part in zip(initial, bank, strict=True)))


def slope_at(span: Span, initial: Bank, bank: Bank, key: Tensor, target: Tensor) -> Slope:
    """Each token's gradient at its anchor."""
    wanted = Reading(target.unsqueeze(2), target.new_zeros(*target.shape[:2], 0, target.shape[2]))
    here = slope(bank, key, wanted)
    if span.fresh_BC is None:
        return here
    there, tokens = slope(initial, key, wanted), span.fresh_BC
    vectors = torch.where(tokens[:, None, None, :, None], there.vectors, here.vectors)
    active = torch.where(tokens[:, None, None, :, None], there.active, here.active)
    rest = [anchored(tokens, a, b) for a, b in ((there.before, here.before), (there.back, here.back))]
    return Slope(key, rest[0], active, vectors, here.gates, rest[1])


def look(span: Span, initial: Bank, bank: Bank, q: Tensor) -> Tensor:
    """What each token's anchor says to its query (B, H, C, K)."""
    said = read(bank, q).vectors[:, :, 0]
    return said if span.fresh_BC is None else anchored(span.fresh_BC, read(initial, q).vectors[:, :, 0], said)


def step(memory: Memory, initial: Bank, tokens: Tokens, span: Span) -> Memory:
    """The memory after a chunk's writes."""
    scalars = filtered(span, tokens.log_momentum)
    at = slope_at(span, initial, memory.bank, tokens.k, tokens.v)
    renewed = None if span.fresh_BC is None else span.fresh_BC[:, -1]
    kept, old = renew(renewed, initial, memory.bank), memory.momentum
    written, held = (
        Bank(first_layer(at, tokens.rate * weight), *second_layer(at, tokens.rate * weight))
        for weight in (scalars.write_BHC, scalars.hold_BHC)
    )
    bank = [
        mix((span.whole_BH, was), (scalars.carry_BH, speed), (-1.0, new))
        for was, speed, new in zip(kept, old, written, strict=True)
    ]
    momentum = [mix((scalars.left_BH, speed), (-1.0, new)) for speed, new in zip(old, held, strict=True)]
    return Memory(Bank(*bank), Bank(*momentum))


def titans(tokens: Tokens, chunk: int, initial: Bank, memory: Memory | None = None) -> tuple[Tensor, Memory]:
    """Readings (B, H, T, K) and the memory after the last token; raises ValueError where `chunk` does not divide T."""
    count = tokens.k.shape[2]
    if count % chunk:
        raise ValueError(f"{count} tokens are no multiple of the chunk of {chunk}")
    memory, outputs = memory or begin(initial), []
    for first in range(0, count, chunk):
        starts = None if tokens.starts is None else tokens.starts[:, first : first + chunk]
        q, k, v, rate, momentum, keep = (part[:, :, first : first + chunk] for part in tokens[:6])
        each = Tokens(q, k, v, rate, momentum, keep, starts)
        span = span_of(each.log_keep, each.starts)
        outputs.append(look(span, initial, memory.bank, each.q))
        memory = step(memory, initial, each, span)
    return torch.cat(outputs, 2), memory
