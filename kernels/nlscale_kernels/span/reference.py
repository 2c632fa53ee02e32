"""How much of what was written is left: the scalars that every chunk-parallel memory shares (spec 2.6, 2.9).

A memory keeps the share a_t of its state at token t and adds a write. In a chunk of C tokens everything follows from
products of these shares, and every ratio is at most 1, so nothing overflows. A token at which a document begins finds the
initial state: what was written before is out of its sight, and out of the state that the chunk leaves.

B rows, H heads, C tokens of a chunk; tokens are counted inside the chunk.
"""

from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor

LN2 = log(2)
LOG2E = 1 / LN2  # powers of 2 are faster than powers of e


@dataclass(frozen=True)
class Span:
    """The shares of one chunk, or of many side by side (N before C). A token's anchor is the state at the chunk's begin
    or, where its document began in the chunk, the initial state.
    """

    keep_BHC: Tensor  # a_t
    total_BHC: Tensor  # log2 of what is left at token t of the chunk's begin, t's own share included
    earlier_BHC: Tensor  # the same before token t
    before_BHC: Tensor  # share of the anchor when token t comes
    after_BHC: Tensor  # of the write of token t at the chunk's end; 0 where a later document began
    whole_BH: Tensor  # of the last token's anchor at the chunk's end
    document_BC: Tensor | None  # how many documents began in the chunk, up to each token; None: no document begins

    @property
    def fresh_BC(self) -> Tensor | None:
        """True where the anchor is the initial state; None: nowhere."""
        return None if self.document_BC is None else self.document_BC > 0

    @property
    def last_BC(self) -> Tensor | None:
        """True for the tokens of the chunk's last document; None: all."""
        return None if self.document_BC is None else self.document_BC == self.document_BC[..., -1:]

    @property
    def between_BHCC(self) -> Tensor:
        """Of the write of token i (column) when token t (row) comes; 0 unless i < t, one document."""
        return between(self.earlier_BHC, self.total_BHC, self.document_BC, -1)

    @property
    def through_BHCC(self) -> Tensor:
        """Of the write of token i when token t has decayed and written, t = i included."""
        return between(self.total_BHC, self.total_BHC, self.document_BC, 0)


def between(row_BHC: Tensor, column_BHC: Tensor, document_BC: Tensor | None, diagonal: int) -> Tensor:
    """2^(row - column) where the column's token is no later (`diagonal` 0) or earlier (-1), in one document; else 0."""
    tokens = row_BHC.shape[-1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=row_BHC.device).tril(diagonal)
    if document_BC is not None:
        allowed = allowed & (document_BC.unsqueeze(-1) == document_BC.unsqueeze(-2)).unsqueeze(1)
    return (row_BHC.unsqueeze(-1) + floor(allowed, row_BHC.dtype) - column_BHC.unsqueeze(-2)).exp2()


def span_of(log_keep_BHC: Tensor, starts_BC: Tensor | None) -> Span:
    """The shares of a chunk from log a_t (at most 0); `starts` is true at a document's first token, None: nowhere.

    Of many chunks at once: (B, H, N, C) and (B, N, C).
    """
    log_BHC = log_keep_BHC * LOG2E
    total = log_BHC.cumsum(-1)
    earlier = total - log_BHC
    document, base, after = None, torch.zeros_like(total[..., :1]), total[..., -1:] - total
    if starts_BC is not None:
        document = starts_BC.cumsum(-1, dtype=torch.int32)
        place = torch.arange(total.shape[-1], device=total.device)
        first_BC = torch.where(starts_BC, place, 0).cummax(-1).values  # where each token's document begins, or 0
        base = earlier.gather(-1, first_BC.unsqueeze(1).expand_as(total))
        after = after.masked_fill((document != document[..., -1:]).unsqueeze(1), -torch.inf)
    whole = (total[..., -1] - base[..., -1]).exp2()
    return Span(log_BHC.exp2(), total, earlier, (earlier - base).exp2(), after.exp2(), whole, document)


def floor(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `allowed`, elsewhere -inf: added before a power of 2 it costs less than a mask, and backward nothing."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def anchored(fresh: Tensor | None, initial: Tensor, anchor: Tensor) -> Tensor:
    """`initial` where `fresh`, else `anchor`; both (B or 1, H, ...), `fresh` (B,) or None or (B, C) for (B, H, C, ...)."""
    if fresh is None:
        return anchor
    shape = [fresh.shape[0], 1, *fresh.shape[1:]]
    return torch.where(fresh.view(*shape, *[1] * (anchor.ndim - len(shape))), initial, anchor)


@dataclass(frozen=True)
class Filter:
    """Writes that go through a momentum before they reach the state: s_t = c_t s_{t-1} + w_t, M_t = a_t M_{t-1} + s_t.

    The momentum of a new document begins at zero.
    """

    write_BHC: Tensor  # how much of w_t reaches the state at the chunk's end
    hold_BHC: Tensor  # how much of w_t is in the momentum at the chunk's end
    carry_BH: Tensor  # how much of the momentum at the chunk's begin reaches the state
    left_BH: Tensor  # how much of it is left in the momentum


def filtered(span: Span, log_momentum_BHC: Tensor) -> Filter:
    """The scalars of a chunk with momentum, from log c_t (at most 0): one scan, no token's state is ever made [V11]."""
    total = (log_momentum_BHC * LOG2E).cumsum(-1)
    # A write of an earlier document is kept out by after_BHC, which is zero for all tokens before the last begin.
    ends = 1.0 if span.last_BC is None else span.last_BC.unsqueeze(1).to(total.dtype)
    write = Seen.apply(total, span.after_BHC) * ends
    hold = (total[..., -1:] - total).exp2() * ends
    old = (span.after_BHC * total.exp2()).sum(-1)
    left = total[..., -1].exp2()
    if span.fresh_BC is not None:
        kept = (~span.fresh_BC[:, -1:]).to(total.dtype)
        old, left = old * kept, left * kept
    return Filter(write, hold, old, left)


def ahead(total_BHC: Tensor) -> Tensor:
    """2^(total_t - total_i) for token t (column) no earlier than token i (row), else 0: (B, H, C, C)."""
    tokens = total_BHC.shape[-1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=total_BHC.device).triu()
    return (total_BHC.unsqueeze(-2) + floor(later, total_BHC.dtype) - total_BHC.unsqueeze(-1)).exp2()


class Seen(torch.autograd.Function):
    """sum_t 2^(total_t - total_i) after_t over t >= i, (B, H, C); backward makes the C x C shares anew."""

    @staticmethod
    def forward(ctx: Any, total_BHC: Tensor, after_BHC: Tensor) -> Tensor:
        """For every token i."""
        seen = (ahead(total_BHC) * after_BHC.unsqueeze(-2)).sum(-1)
        ctx.save_for_backward(total_BHC, after_BHC, seen)
        return seen

    @staticmethod
    def backward(ctx: Any, of: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Of totals and of what is after a token; differentiable in turn."""
        total, after, seen = ctx.saved_tensors
        d_after = (of.unsqueeze(-2) @ ahead(total)).squeeze(-2)
        return LN2 * (after * d_after - of * seen), d_after
