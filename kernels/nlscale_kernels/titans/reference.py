"""Titans' long-term memory: gradient steps with momentum and forgetting, by chunks (Titans, 2501.00663; spec 2.9).

    S_t = c_t S_{t-1} - e_t grad |M(k_t) - v_t|^2 / 2       c_t momentum, e_t rate
    M_t = a_t M_{t-1} + S_t                                 a_t the share kept: 1 - alpha_t of the paper

Gradients of a chunk are taken at its anchor (the state before it; eq. 16), so the state after it is a weighted sum of
them, and no token's state is ever made. Tokens of a chunk read the anchor: what a token reads was written before the
chunk. A document that begins inside a chunk reads, and is written into, the initial state.

A row may come in parts of any length: tokens of a chunk that is not whole yet have been read, wait in the state, and are
written once the rest of the chunk is there.

B rows, H heads, T tokens, C tokens of a chunk, K head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.mlp_memory import Net, Step, gathered, moved, read
from nlscale_kernels.recompute import recomputed
from nlscale_kernels.runs import after, cut
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
    """Weights and momentum, and the tokens of a chunk that is not whole yet."""

    net: Net
    momentum: Net
    pending: Tokens | None = None


def begin(initial: Net) -> Memory:
    """The memory before any token; `initial` has a row dimension of 1."""
    return Memory(initial, Net(*(torch.zeros_like(part) for part in initial)))


def look(fresh_BC: Tensor | None, initial: Net, net: Net, q: Tensor, activation: str = "silu") -> Tensor:
    """What each token's anchor says to its query (B, H, C, K); `fresh`: where the anchor is the initial state."""
    said = read(net, q, activation)[:, :, 0]
    return said if fresh_BC is None else anchored(fresh_BC, read(initial, q, activation)[:, :, 0], said)


def step(memory: Memory, initial: Net, tokens: Tokens, span: Span, activation: str = "silu") -> Memory:
    """The memory after a chunk's writes."""
    scalars, renewed = filtered(span, tokens.log_momentum), None
    if span.fresh_BC is not None:
        renewed = span.fresh_BC[:, -1]
    shares = [tokens.rate * each for each in (scalars.write_BHC, scalars.hold_BHC)]
    written, held = gradients(initial, memory.net, tokens, shares, span.fresh_BC, activation)
    kept = [anchored(renewed, first, part) for first, part in zip(initial, memory.net, strict=True)]
    factors, steps = (
        (span.whole_BH, scalars.carry_BH, scalars.left_BH, -1.0),
        zip(kept, memory.momentum, written, held, strict=True),
    )
    (up, up_speed), (down, down_speed) = (moved(Step(*each, *factors)) for each in steps)
    assert up_speed is not None and down_speed is not None
    return Memory(Net(up, down), Net(up_speed, down_speed))


def gradients(
    initial: Net, net: Net, tokens: Tokens, shares: list[Tensor], fresh_BC: Tensor | None, activation: str
) -> list[Net]:
    """All tokens' gradients at their anchors, summed with each of the weights (B, H, C)."""
    if fresh_BC is not None:
        apart = [(fresh_BC, initial), (~fresh_BC, net)]
        parts = [
            gradients(anchor, anchor, tokens, [w * mark[:, None] for w in shares], None, activation)
            for mark, anchor in apart
        ]
        return [Net(*(a + b for a, b in zip(*pair, strict=True))) for pair in zip(*parts, strict=True)]
    arrives = torch.cat([tokens.k * share.unsqueeze(-1) for share in shares], -1)
    first, second = gathered(net, tokens.k, tokens.v.unsqueeze(2), arrives, shares, activation)
    return [Net(up, down) for up, down in zip(first.chunk(len(shares), -1), second, strict=True)]


def titans(
    tokens: Tokens, chunk: int, initial: Net, memory: Memory | None = None, recompute: int = 0, activation: str = "silu"
) -> tuple[Tensor, Memory]:
    """Readings (B, H, T, K) and the memory after the last token.

    `activation`: of the memory's units (mlp_memory). `recompute`: so many chunks are computed again in backward as one
    piece; 0: none.
    """
    memory = memory or begin(initial)
    joined, outputs = after(memory.pending, tokens), []
    count = joined.k.shape[2]
    written = count - count % chunk

    def run(piece: Tokens, memory: Memory, initial: Net) -> tuple[Tensor, Memory]:
        outputs = []
        for first in range(0, piece.k.shape[2], chunk):
            each = cut(piece, first, first + chunk)
            span = span_of(each.log_keep, each.starts)
            outputs.append(look(span.fresh_BC, initial, memory.net, each.q, activation))
            memory = step(memory, initial, each, span, activation)
        return torch.cat(outputs, 2), memory

    memory, size = memory._replace(pending=None), recompute * chunk or written
    for first in range(0, written, size or 1):
        again, piece = recompute and torch.is_grad_enabled(), cut(joined, first, min(first + size, written))
        o, memory = recomputed(run, piece, memory, initial) if again else run(piece, memory, initial)
        outputs.append(o)
    if written < count:
        rest = cut(joined, written)
        fresh = None if rest.starts is None else rest.starts.cumsum(-1) > 0
        outputs.append(look(fresh, initial, memory.net, rest.q, activation))
        memory = memory._replace(pending=rest)
    return torch.cat(outputs, 2)[:, :, count - tokens.k.shape[2] :], memory
