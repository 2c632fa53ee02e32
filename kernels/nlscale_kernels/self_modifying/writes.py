"""How the writes of a chunk arrive at its end: scalars a token, and one K x K turn of every W2 (spec 2.6).

A chunk takes W2 to W2 turn + sum_t w_t reach_t^T, where w_t is what token t writes along its key: later erasures act on
earlier writes, so reach is one triangular solve, and so is the turn. Chunks in a row join by products of K x K matrices, so
that memories with longer chunks need no larger solve.

B rows, H heads, C tokens of a chunk, K head width.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.self_modifying.op import Given, arriving
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
    ends: bool = False  # nobody asks for the momentum after it

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
    arrives = arriving(Given(k, rate, span.earlier_BHC, span.total_BHC, span.after_BHC, span.document_BC))
    unit = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    turn = span.whole_BH[..., None, None] * unit - Erased.apply(k, (rate * span.before_BHC).unsqueeze(-1), arrives)
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


class Erased(torch.autograd.Function):
    """(share k)^T reach (B, H, K, K), share (B, H, C, 1); nothing but the three is kept."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, share: Tensor, reach: Tensor) -> Tensor:
        """What a chunk takes out of W2, but for the sign."""
        ctx.save_for_backward(k, share, reach)
        return (share * k).mT @ reach

    @staticmethod
    def backward(ctx: Any, of: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Of the three; differentiable in turn."""
        k, share, reach = ctx.saved_tensors
        along = reach @ of.mT
        return share * along, (along * k).sum(-1, keepdim=True), (share * k) @ of


class Onward(NamedTuple):
    """What a run of chunks does to what was written before it: nothing of that is left where a document began in the run."""

    turn: Tensor  # (B, H, K, K), of W2
    share_BH: Tensor  # of W1, from state to state
    carry_BH: Tensor  # from momentum to state
    left_BH: Tensor  # from momentum to momentum

    def but_for(self, renewed_B: Tensor | None) -> "Onward":
        """Nothing is left where a document began."""
        if renewed_B is None:
            return self
        gone = renewed_B[:, None]
        return self._replace(
            turn=self.turn.masked_fill(gone[..., None, None], 0), share_BH=self.share_BH.masked_fill(gone, 0)
        )


def joined(chunks: Sequence[Writes]) -> Writes:
    """The writes of chunks in a row, all of one length, as those of one: later chunks act on what earlier ones left.

    From the last chunk to the first, so that each is turned once, by the product of all turns after it.
    """
    *earlier, last = chunks
    if not earlier:
        return last
    said, alive_B = of(last), None if last.renewed_B is None else ~last.renewed_B  # where no document began since
    turn, whole, onward = said.turn, said.share_BH, said.but_for(last.renewed_B)
    behind: list[Onward] = []
    weights, means = [last.weight_B], [last.momentum]
    for chunk in reversed(earlier):
        behind.insert(0, onward)
        both = through(of(chunk), onward)
        weight = chunk.weight_B
        if alive_B is None or chunk.renewed_B is None:
            turn, whole = both.turn, both.share_BH
        else:
            mark = alive_B[:, None]
            turn, whole = torch.where(mark[..., None, None], both.turn, turn), torch.where(mark, both.share_BH, whole)
            weight, alive_B = weight * alive_B, alive_B & ~chunk.renewed_B
        onward = both.but_for(chunk.renewed_B)
        weights, means = [*weights, weight], [*means, chunk.momentum]
    reach = stacked(part.reach for part in earlier) @ stacked(part.turn for part in behind)
    each = [part.scalars for part in earlier]
    write, hold = stacked(part.write_BHC for part in each), stacked(part.hold_BHC for part in each)
    share, carry, left = (stacked(part[n].unsqueeze(-1) for part in behind) for n in (1, 2, 3))
    ends = last.scalars
    scalars = Scalars(
        whole,
        torch.cat([(write * share + hold * carry).flatten(2), ends.write_BHC], -1),
        onward.carry_BH,
        onward.left_BH,
        torch.cat([(hold * left).flatten(2), ends.hold_BHC], -1),
    )
    mean, weight = averaged(means, weights)
    return Writes(turn, torch.cat([reach.flatten(2, 3), last.reach], 2), scalars, mean, weight, fresh(chunks))


def of(chunk: Writes) -> Onward:
    """One chunk, as its last document's tokens see it."""
    return Onward(chunk.turn, chunk.scalars.whole_BH, chunk.scalars.carry_BH, chunk.scalars.left_BH)


def through(first: Onward, then: Onward) -> Onward:
    """Two runs, one after the other."""
    carry = first.carry_BH * then.share_BH + first.left_BH * then.carry_BH
    return Onward(first.turn @ then.turn, first.share_BH * then.share_BH, carry, first.left_BH * then.left_BH)


def stacked(parts: Iterable[Tensor]) -> Tensor:
    """(B, H, ...) of each chunk -> (B, H, N, ...)."""
    return torch.stack(list(parts), 2)


def averaged(means: Sequence[Tensor | None], weights: Sequence[Tensor | float]) -> tuple[Tensor | None, Tensor | float]:
    """Mean momentum of the last document's tokens, and their number."""
    total: Tensor | float = sum(weights)
    if means[0] is None:
        return None, total
    column = [weight.unsqueeze(1) if isinstance(weight, Tensor) else weight for weight in [*weights, total]]
    parts = [mean * weight for mean, weight in zip(means, column, strict=False) if mean is not None]
    return sum(parts[1:], parts[0]) / column[-1], total


def fresh(chunks: Sequence[Writes]) -> Tensor | None:
    """Where a token's anchor is the initial state, counted from the first chunk on."""
    marks = [chunk.fresh_BC for chunk in chunks if chunk.fresh_BC is not None]
    return torch.cat(marks, -1).cummax(-1).values if marks else None
