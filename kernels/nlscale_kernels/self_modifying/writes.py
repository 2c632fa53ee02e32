"""How the writes of a chunk arrive at its end: scalars a token, and one K x K turn of every W2 (spec 2.6).

A chunk takes W2 to W2 turn + sum_t w_t reach_t^T, where w_t is what token t writes along its key: later erasures act on
earlier writes, so reach is one triangular solve, and so is the turn. Chunks in a row join by products of K x K matrices, so
that memories with longer chunks need no larger solve.

B rows, H heads, C tokens of a chunk, K head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.self_modifying.op import reach
from nlscale_kernels.span import filtered, span_of


class Scalars(NamedTuple):
    """How much arrives at the chunk's end, of states and of writes; the last three with momentum only (else zero)."""

    whole_BH: Tensor  # of the last document's anchor
    write_BHC: Tensor  # of each token's write, in the state
    carry_BH: Tensor  # of the momentum before, in the state
    left_BH: Tensor  # of it, in the momentum
    hold_BHC: Tensor  # of each token's write, in the momentum


class Writes(NamedTuple):
    """A chunk's, the same for all memories."""

    turn: Tensor  # (B, H, K, K), of the last document's anchor
    reach: Tensor  # (B, H, C, K)
    scalars: Scalars
    momentum: Tensor | None  # (B, H): mean momentum of the last document's tokens
    weight_B: Tensor | float  # tokens of the last document
    fresh_BC: Tensor | None  # the token's anchor is the initial state

    @property
    def renewed_B(self) -> Tensor | None:
        """Whether a document began in the chunk."""
        return None if self.fresh_BC is None else self.fresh_BC[:, -1]

    @property
    def carried(self) -> Tensor | None:
        """How much of W2's momentum goes on, (B, H): nothing where a document began in the chunk."""
        if self.momentum is None or self.renewed_B is None:
            return self.momentum
        return self.momentum.masked_fill(self.renewed_B[:, None], 0)


def writes_of(
    k: Tensor, rate: Tensor, log_keep: Tensor, log_momentum: Tensor | None, starts: Tensor | None, erase: float = 1.0
) -> Writes:
    """Of one chunk: keys (B, H, C, K), rates, logs of shares kept and of momentum (B, H, C), starts (B, C).

    `erase`: how much of its rate a token erases with along its key; 0 is gradient descent without the delta rule's term.
    """
    span, rate = span_of(log_keep, starts), rate * erase
    arrives = reach(k, rate, span.earlier_BHC, span.total_BHC, span.after_BHC, span.document_BC)
    unit = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    turn = span.whole_BH[..., None, None] * unit - ((rate * span.before_BHC).unsqueeze(-1) * k).mT @ arrives
    nothing = torch.zeros_like(span.whole_BH)
    scalars = Scalars(span.whole_BH, span.after_BHC, nothing, nothing, torch.zeros_like(span.after_BHC))
    mean: Tensor | None = None
    weight: Tensor | float = float(k.shape[2])
    if log_momentum is not None:
        each = filtered(span, log_momentum)
        scalars = Scalars(span.whole_BH, each.write_BHC, each.carry_BH, each.left_BH, each.hold_BHC)
        share = log_momentum.exp()
        if span.last_BC is None:
            mean = share.mean(-1)
        else:
            last = span.last_BC.to(share.dtype)
            count = last.sum(-1)
            mean, weight = (share * last.unsqueeze(1)).sum(-1) / count.unsqueeze(1), count
    return Writes(turn, arrives, scalars, mean, weight, span.fresh_BC)


def joined(chunks: Sequence[Writes]) -> Writes:
    """The writes of chunks in a row as those of one: later chunks act on what earlier ones left."""
    total = chunks[0]
    for then in chunks[1:]:
        total = after(total, then)
    return total


def after(first: Writes, then: Writes) -> Writes:
    """Two runs of tokens, one after the other."""
    renewed = then.renewed_B
    going_on = 1.0 if renewed is None else (~renewed).to(first.turn.dtype)[:, None]
    a, b = first.scalars, then.scalars
    share = b.whole_BH * going_on  # of an earlier state; carry_BH and left_BH are zero where a document began
    forward = then.turn if renewed is None else then.turn.masked_fill(renewed[:, None, None, None], 0)
    through = first.turn @ then.turn
    whole = a.whole_BH * b.whole_BH
    carry, left = a.carry_BH * share + a.left_BH * b.carry_BH, a.left_BH * b.left_BH
    if renewed is not None:
        through = torch.where(renewed[:, None, None, None], then.turn, through)
        whole = torch.where(renewed[:, None], b.whole_BH, whole)
    write = a.write_BHC * share.unsqueeze(-1) + a.hold_BHC * b.carry_BH.unsqueeze(-1)
    hold = a.hold_BHC * b.left_BH.unsqueeze(-1)
    scalars = Scalars(whole, torch.cat([write, b.write_BHC], -1), carry, left, torch.cat([hold, b.hold_BHC], -1))
    fresh = None
    if first.fresh_BC is not None and then.fresh_BC is not None:
        fresh = torch.cat([first.fresh_BC, then.fresh_BC | first.fresh_BC[:, -1:]], -1)
    reach = torch.cat([first.reach @ forward, then.reach], 2)
    mean, weight = averaged(first, then, going_on)
    return Writes(through, reach, scalars, mean, weight, fresh)


def averaged(first: Writes, then: Writes, going_on: Tensor | float) -> tuple[Tensor | None, Tensor | float]:
    """Mean momentum of the last document's tokens, and their number."""
    if first.momentum is None or then.momentum is None:
        return None, 0.0
    if not isinstance(first.weight_B, Tensor) or not isinstance(then.weight_B, Tensor):
        total = float(first.weight_B) + float(then.weight_B)
        return (first.momentum * float(first.weight_B) + then.momentum * float(then.weight_B)) / total, total
    assert isinstance(going_on, Tensor)
    old = first.weight_B * going_on[:, 0]
    total_B = old + then.weight_B
    mean = (first.momentum * old[:, None] + then.momentum * then.weight_B[:, None]) / total_B[:, None]
    return mean, total_B
