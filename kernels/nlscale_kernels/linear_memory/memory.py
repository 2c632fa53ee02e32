"""A memory that is a matrix, token by token and by chunks (spec 1, rows 6, 7, 35; 2.6, 2.11).

    linear          M_t = a_t M_{t-1}                              + e_t v_t k_t^T   one gradient step on -<M k, v>
    delta           M_t = M_{t-1} (a_t I - e_t k k^T)              + e_t v_t k_t^T   one gradient step on |M k - v|^2 / 2
    delta_frozen    M_t = a_t M_{t-1} - e_t M_anchor k k^T         + e_t v_t k_t^T   the same, taken at the chunk's anchor
    dgd             M_t = M_{t-1} (a_t I - 2 e_t k k^T)            + e_t v_t k_t^T   Delta Gradient Descent on it
    dgd_frozen      M_t = M_{t-1} (a_t I - e_t k k^T) - e_t M_anchor k k^T + e_t v_t k_t^T
    o_t = M_t q_t

B rows, H heads, T tokens, N chunks of C tokens, K key width, V value width; a_t is the share kept, e_t the rate.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.arguments import check_divides
from nlscale_kernels.linear_memory.op import matrix_memory
from nlscale_kernels.linear_memory.reference import Given, Scalars
from nlscale_kernels.runs import cut
from nlscale_kernels.span import Span, span_of


class Tokens(NamedTuple):
    """What a run of tokens brings; keys, values, queries (B, H, T, .), gates (B, H, T), starts (B, T) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    log_keep: Tensor
    starts: Tensor | None = None

    def count(self, size: int) -> int:
        """How many chunks; raises ValueError where their size does not divide the tokens."""
        check_divides(size, self.k.shape[2])
        return self.k.shape[2] // size


@dataclass(frozen=True)
class Rule:
    """What a token takes away along its key, in units of its rate: M_t = a_t M_{t-1} + e_t (v - erases M_{t-1} k -
    frozen M_anchor k) k^T.
    """

    erases: float = 0.0
    frozen: float = 0.0

    def hears(self, span: Span) -> Tensor:
        """How much of what the anchor says (B, H, N, C)."""
        return self.erases * span.before_BHC + self.frozen


RULES = {
    "linear": Rule(),
    "delta": Rule(erases=1.0),
    "delta_frozen": Rule(frozen=1.0),
    "dgd": Rule(erases=2.0),
    "dgd_frozen": Rule(erases=1.0, frozen=1.0),
}


class Prepared(NamedTuple):
    """What the operator is given, and what queries hear of initial states beside (B, H, T, V)."""

    given: Given
    told: Tensor | None


def prepared(rule: str, tokens: Tokens, chunk: int, initial_HVK: Tensor, state_BHVK: Tensor | None) -> Prepared:
    """The rule and the documents as scalars: where the anchor is the initial state, what it says is known beforehand."""
    shape, how = (tokens.count(chunk), chunk), RULES[rule]
    initial, starts = initial_HVK.unsqueeze(0), tokens.starts
    state = initial.expand(tokens.k.shape[0], *initial_HVK.shape) if state_BHVK is None else state_BHVK
    span = span_of(tokens.log_keep.unflatten(2, shape), None if starts is None else starts.unflatten(1, shape))
    hears, share, whole = how.hears(span), span.before_BHC * span.keep_BHC, span.whole_BH
    base, v, told, document = torch.zeros_like(whole), tokens.v, None, None
    if span.document_BC is not None and span.fresh_BC is not None:
        document, new = span.document_BC.flatten(1), span.fresh_BC.to(share.dtype).unsqueeze(1)
        if how.erases or how.frozen:
            v = v - (hears * new).flatten(2).unsqueeze(-1) * (tokens.k @ initial.mT)
        told = (share * new).flatten(2).unsqueeze(-1) * (tokens.q @ initial.mT)
        base = whole * new[..., -1]
        hears, share, whole = hears * (1 - new), share * (1 - new), whole - base
    rate = tokens.rate.unflatten(2, shape)
    each = Scalars(how.erases * rate, rate, hears * rate, span.earlier_BHC, span.total_BHC, share, span.after_BHC)
    scalars, ends = torch.stack([x.flatten(2) for x in each]), torch.stack([whole, base])
    flags = bool(how.erases), bool(how.erases or how.frozen)
    return Prepared(Given(tokens.q, tokens.k, v, scalars, ends, document, initial_HVK, state, *flags), told)


def linear_memory(
    rule: str, tokens: Tokens, chunk: int, initial_HVK: Tensor, state_BHVK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, V) and the state (B, H, V, K) after the last token, by chunks.

    `initial`: what a document begins with; `state`: what earlier tokens of the rows left, None: nothing. Where the chunk
    does not divide the tokens, the last chunk is shorter; a rule that hears its anchor, which would then hear another
    one, raises ValueError.
    """
    rest, exact = tokens.k.shape[2] % chunk, not RULES[rule].frozen
    if tokens.k.shape[2] == 1 and exact:  # fewer operations than a chunk's
        return serial(rule, tokens, initial_HVK, state_BHVK)
    if rest and exact:
        parts = [cut(tokens, 0, -rest)] if rest < tokens.k.shape[2] else []
        outputs = []
        for part, size in zip((*parts, cut(tokens, -rest)), (*[chunk] * len(parts), rest), strict=True):
            o, state_BHVK = linear_memory(rule, part, size, initial_HVK, state_BHVK)
            outputs.append(o)
        assert state_BHVK is not None
        return torch.cat(outputs, 2), state_BHVK
    given, told = prepared(rule, tokens, chunk, initial_HVK, state_BHVK)
    o, state = matrix_memory(given)
    return o if told is None else o + told, state


class Affine(NamedTuple):
    """What a run of tokens does to any state: M -> M kept + added (spec V21)."""

    kept: Tensor  # (B, H, K, K)
    added: Tensor  # (B, H, V, K)


def compose(first: Affine, then: Affine) -> Affine:
    """Both runs, one after the other."""
    return Affine(first.kept @ then.kept, first.added @ then.kept + then.added)


def affine(rule: str, tokens: Tokens, chunk: int, initial_HVK: Tensor) -> Affine:
    """The map of a whole run, so that ranks that hold parts of a row need to hear of one another only once.

    What is kept is what the run leaves of unit rows that no value is written to, what is added what it leaves of zero.
    """
    B, H, _, K = tokens.k.shape
    unit = torch.eye(K, dtype=tokens.k.dtype, device=tokens.k.device).expand(B, H, K, K)
    state = torch.cat([unit, unit.new_zeros(B, H, tokens.v.shape[-1], K)], 2)
    initial = torch.cat([torch.zeros_like(unit[0]), initial_HVK], 1)
    both = tokens._replace(v=torch.cat([torch.zeros_like(tokens.k), tokens.v], -1))
    _, last = linear_memory(rule, both, chunk, initial, state)
    return Affine(*last.split([K, tokens.v.shape[-1]], 2))


def serial(
    rule: str, tokens: Tokens, initial_HVK: Tensor, state_BHVK: Tensor | None = None, chunk: int = 1
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, token by token: the form that the others are held against. `chunk`: how long anchors stand."""
    rows, how = tokens.k.shape[0], RULES[rule]
    initial = initial_HVK.expand(rows, *initial_HVK.shape)
    state = initial if state_BHVK is None else state_BHVK
    outputs, anchor = [], state
    for t in range(tokens.k.shape[2]):
        anchor = state if t % chunk == 0 else anchor
        if tokens.starts is not None:
            begins = tokens.starts[:, t, None, None, None]
            state, anchor = torch.where(begins, initial, state), torch.where(begins, initial, anchor)
        q, k, v = (part[:, :, t] for part in (tokens.q, tokens.k, tokens.v))
        rate, keep = tokens.rate[:, :, t, None, None], tokens.log_keep[:, :, t, None, None].exp()
        write = v - ((how.erases * state + how.frozen * anchor) @ k.unsqueeze(-1)).squeeze(-1)
        state = keep * state + rate * write.unsqueeze(-1) * k.unsqueeze(-2)
        outputs.append((state @ q.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 2), state
