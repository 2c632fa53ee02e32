"""A memory that is a matrix: linear attention and the gated delta rule, token by token and by chunks (spec 1, rows 6, 7).

    linear   M_t = a_t M_{t-1}                + e_t v_t k_t^T       one gradient step on -<M k, v>
    delta    M_t = M_{t-1} (a_t I - e_t k k^T) + e_t v_t k_t^T      one gradient step on |M k - v|^2 / 2, with decay
    o_t = M_t q_t

B rows, H heads, T tokens, C tokens of a chunk, K key width, V value width; a_t is the share kept, e_t the rate.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.span import Span, anchored, span_of


class Tokens(NamedTuple):
    """What a run of tokens brings; keys, values, queries (B, H, T, .), gates (B, H, T), starts (B, T) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    log_keep: Tensor
    starts: Tensor | None = None

    def chunks(self, size: int) -> list["Tokens"]:
        """Runs of `size` tokens; raises ValueError where it does not divide."""
        tokens = self.k.shape[2]
        if tokens % size:
            raise ValueError(f"{tokens} tokens are no multiple of the chunk of {size}")
        parts = [part.split(size, 2) for part in self[:5]]
        starts = self.starts.split(size, 1) if self.starts is not None else [None] * (tokens // size)
        return [Tokens(*each) for each in zip(*parts, starts, strict=True)]


def erasures(span: Span, rate_BHC: Tensor, k_BHCK: Tensor) -> Tensor:
    """L of I + L, strict_lower(diag(e) (D * K K^T)): what the delta rule's erasures do to one another (spec 2.6, V9)."""
    return span.between_BHCC * ((rate_BHC.unsqueeze(-1) * k_BHCK) @ k_BHCK.mT)


def solved(span: Span, rate_BHC: Tensor, k_BHCK: Tensor, right: Tensor) -> Tensor:
    """(I + L)^-1 right; the solver takes the diagonal for ones."""
    return torch.linalg.solve_triangular(erasures(span, rate_BHC, k_BHCK), right, upper=False, unitriangular=True)


def linear_writes(tokens: Tokens, span: Span, anchor_BHCV: Tensor) -> Tensor:
    """u_t of M_t = share of the anchor + sum of shares of u_i k_i^T, for linear attention."""
    return tokens.rate.unsqueeze(-1) * tokens.v


def delta_writes(tokens: Tokens, span: Span, anchor_BHCV: Tensor) -> Tensor:
    """The same for the delta rule; `anchor`: what each token's anchor says to its key."""
    right = tokens.v - span.before_BHC.unsqueeze(-1) * anchor_BHCV
    return solved(span, tokens.rate, tokens.k, tokens.rate.unsqueeze(-1) * right)


Writes = Callable[[Tokens, Span, Tensor], Tensor]
RULES: dict[str, Writes] = {"linear": linear_writes, "delta": delta_writes}


def linear_memory(
    rule: str, tokens: Tokens, chunk: int, initial_HVK: Tensor, state_BHVK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, V) and the state (B, H, V, K) after the last token, by chunks.

    `initial`: what a document begins with; `state`: what earlier tokens of the rows left, None: nothing.
    """
    initial = initial_HVK.unsqueeze(0)
    state = initial if state_BHVK is None else state_BHVK
    outputs = []
    for each in tokens.chunks(chunk):
        span = span_of(each.log_keep, each.starts)
        heard = anchored(span.fresh_BC, each.k @ initial.mT, each.k @ state.mT)
        u = RULES[rule](each, span, heard)
        asked = anchored(span.fresh_BC, each.q @ initial.mT, each.q @ state.mT)
        share = (span.before_BHC * span.keep_BHC).unsqueeze(-1)
        outputs.append(share * asked + (span.through_BHCC * (each.q @ each.k.mT)) @ u)
        renewed = None if span.fresh_BC is None else span.fresh_BC[:, -1]
        left = anchored(renewed, initial, state)
        state = span.whole_BH[..., None, None] * left + (span.after_BHC.unsqueeze(-1) * u).mT @ each.k
    return torch.cat(outputs, 2), state


class Affine(NamedTuple):
    """What a run of tokens does to any state: M -> M kept + added (spec V21)."""

    kept: Tensor  # (B, H, K, K)
    added: Tensor  # (B, H, V, K)


def compose(first: Affine, then: Affine) -> Affine:
    """Both runs, one after the other."""
    return Affine(first.kept @ then.kept, first.added @ then.kept + then.added)


def affine(rule: str, tokens: Tokens, chunk: int, initial_HVK: Tensor) -> Affine:
    """The map of a whole run, so that ranks that hold parts of a row need to hear of one another only once."""
    total: Affine | None = None
    width = tokens.k.shape[-1]
    unit = torch.eye(width, dtype=tokens.k.dtype, device=tokens.k.device)
    initial = initial_HVK.unsqueeze(0)
    for each in tokens.chunks(chunk):
        span = span_of(each.log_keep, each.starts)
        nothing = torch.zeros_like(each.v)
        after = span.after_BHC.unsqueeze(-1)
        heard = anchored(span.fresh_BC, each.k @ initial.mT, nothing)
        added = (after * RULES[rule](each, span, heard)).mT @ each.k
        kept = span.whole_BH[..., None, None] * unit
        if rule == "delta":  # what tokens whose anchor is the state erase of it
            erase = solved(span, each.rate, each.k, (each.rate * span.before_BHC).unsqueeze(-1) * each.k)
            kept = kept - erase.mT @ (after * each.k)
        if span.fresh_BC is not None:
            renewed = span.fresh_BC[:, -1]
            fresh = span.whole_BH[..., None, None] * initial
            added = added + anchored(renewed, fresh, torch.zeros_like(fresh))
            kept = anchored(renewed, torch.zeros_like(kept), kept)
        step = Affine(kept, added)
        total = step if total is None else compose(total, step)
    assert total is not None
    return total


def serial(rule: str, tokens: Tokens, initial_HVK: Tensor, state_BHVK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence itself, token by token: the form that the others are held against."""
    rows = tokens.k.shape[0]
    initial = initial_HVK.expand(rows, *initial_HVK.shape)
    state = initial if state_BHVK is None else state_BHVK
    outputs = []
    for t in range(tokens.k.shape[2]):
        if tokens.starts is not None:
            state = torch.where(tokens.starts[:, t, None, None, None], initial, state)
        q, k, v = (part[:, :, t] for part in (tokens.q, tokens.k, tokens.v))
        rate, keep = tokens.rate[:, :, t, None, None], tokens.log_keep[:, :, t, None, None].exp()
        write = v if rule == "linear" else v - (state @ k.unsqueeze(-1)).squeeze(-1)
        state = keep * state + rate * write.unsqueeze(-1) * k.unsqueeze(-2)
        outputs.append((state @ q.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 2), state
