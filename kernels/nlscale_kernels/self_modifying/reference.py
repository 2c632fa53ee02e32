"""Self-modifying Titans: memories that write their own keys, values, rates and decay (spec 2.6; eqs. 83-93, corrected).

Five memories a head: key, value, rate, keep and main. With x_t the token's input and every M at the token's anchor,

    k = M_key(x) / |.|    v = M_value(x)    e = e_max sigmoid(M_rate(x) + b)    a = sigmoid(M_keep(x) + b)
    o = M_main(q)         target of memory M: M(v), taken as given;  gradient g of |M(k) - M(v)|^2 / 2
    W2 <- W2 (a I - e k k^T) - e g,   W1 <- a W1 - e g      Delta Gradient Descent on the layer that k enters

The anchor is the state before the chunk, or the initial state where the document began inside the chunk. The erasures of
a chunk act on one another through one triangular matrix, which all memories share. The main memory may have shorter
chunks than the four that make its keys, values and gates. Momentum (Titans): on W1 token by token, on W2 chunk by chunk.

B rows, H heads, T tokens, C tokens of a chunk, K head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlscale_kernels.linear_memory import erasures
from nlscale_kernels.mlp_memory import Bank, Reading, Slope, mix, read, second_layer, slope
from nlscale_kernels.span import Filter, Span, anchored, filtered, span_of


class Tokens(NamedTuple):
    """What a run of tokens brings; log_momentum None: no momentum; starts None: no document begins."""

    x: Tensor  # (B, H, T, K)
    q: Tensor  # (B, H, T, K)
    log_momentum: Tensor | None = None  # (B, H, T)
    starts: Tensor | None = None  # (B, T)

    def part(self, first: int, count: int) -> "Tokens":
        """Tokens first ... first + count."""
        x, q, momentum = (None if t is None else t[:, :, first : first + count] for t in self[:3])
        starts = None if self.starts is None else self.starts[:, first : first + count]
        return Tokens(x, q, momentum, starts)  # type: ignore[arg-type]


class Memories(NamedTuple):
    """The five memories: `makers` are key, value, rate and keep."""

    makers: Bank
    main: Bank


class State(NamedTuple):
    """The memories and, where there is momentum, theirs."""

    memories: Memories
    momentum: Memories | None


class Gates(NamedTuple):
    """Slow constants of a head, each (H,)."""

    rate_bias: Tensor
    keep_bias: Tensor
    rate_max: float


class Made(NamedTuple):
    """What the makers say of the tokens of a chunk: keys and values (B, H, C, K), rates and log a (B, H, C)."""

    k: Tensor
    v: Tensor
    rate: Tensor
    log_keep: Tensor

    def part(self, first: int, count: int) -> "Made":
        """Tokens first ... first + count."""
        return Made(*(each[:, :, first : first + count] for each in self))


class Writes(NamedTuple):
    """What the tokens of a chunk write with, for every memory."""

    k: Tensor
    v: Tensor
    rate: Tensor  # (B, H, C)
    span: Span
    reach: Tensor  # (B, H, C, K): how each token's write on W2 arrives at the chunk's end, through later erasures
    scalars: Filter | None  # with momentum
    momentum: Tensor | None  # (B, H): mean momentum of the last document's tokens, 0 where one began


def begin(initial: Memories, momentum: bool) -> State:
    """The state before any token; `initial` has a row dimension of 1."""
    zero = Memories(*(Bank(*(torch.zeros_like(part) for part in bank)) for bank in initial))
    return State(initial, zero if momentum else None)


def chosen(fresh: Tensor | None, initial: Reading, here: Reading) -> Reading:
    """Readings at each token's anchor."""
    if fresh is None:
        return here
    vectors = torch.where(fresh[:, None, None, :, None], initial.vectors, here.vectors)
    return Reading(vectors, torch.where(fresh[:, None, None, :], initial.gates, here.gates))


def look(fresh: Tensor | None, initial: Bank, bank: Bank, z: Tensor) -> Reading:
    """What the memories at each token's anchor say to z."""
    return chosen(fresh, read(initial, z) if fresh is not None else None, read(bank, z))  # type: ignore[arg-type]


def made(tokens: Tokens, initial: Bank, makers: Bank, gates: Gates) -> "Made":
    """Keys, values, rates and log a of a chunk, as its makers say."""
    fresh = None if tokens.starts is None else tokens.starts.cumsum(-1) > 0
    said = look(fresh, initial, makers, tokens.x)
    k, v = said.vectors.unbind(2)
    rate, keep = said.gates.unbind(2)
    rate = gates.rate_max * torch.sigmoid(rate + gates.rate_bias[:, None])
    return Made(F.normalize(k, dim=-1), v, rate, F.logsigmoid(keep + gates.keep_bias[:, None]))


def writes_of(said: Made, tokens: Tokens) -> Writes:
    """What is the same for all memories."""
    k, v, rate, log_keep = said
    span = span_of(log_keep, tokens.starts)
    scalars, mean = None, None
    if tokens.log_momentum is not None:
        scalars = filtered(span, tokens.log_momentum)
        share = tokens.log_momentum.exp()
        if span.last_BC is None or span.fresh_BC is None:
            mean = share.mean(-1)
        else:  # a document that began in the chunk has no momentum from before
            last = span.last_BC.to(share.dtype).unsqueeze(1)
            mean = (share * last).sum(-1) / last.sum(-1) * (~span.fresh_BC[:, -1:]).to(share.dtype)
    after = span.after_BHC.unsqueeze(-1) * k
    reach = torch.linalg.solve_triangular(erasures(span, rate, k).mT, after, upper=True, unitriangular=True)
    return Writes(k, v, rate, span, reach, scalars, mean)


def slope_at(writes: Writes, initial: Bank, bank: Bank) -> Slope:
    """Each token's gradient at its anchor, with the target that the memory itself gives to the token's value."""
    here = slope(bank, writes.k, read(bank, writes.v))
    fresh = writes.span.fresh_BC
    if fresh is None:
        return here
    there = slope(initial, writes.k, read(initial, writes.v))
    tokens = fresh[:, None, None, :]
    return Slope(
        writes.k,
        anchored(fresh, there.before, here.before),
        torch.where(tokens.unsqueeze(-1), there.active, here.active),
        torch.where(tokens.unsqueeze(-1), there.vectors, here.vectors),
        torch.where(tokens, there.gates, here.gates),
        anchored(fresh, there.back, here.back),
    )


def write(bank: Bank, old: Bank | None, initial: Bank, writes: Writes) -> tuple[Bank, Bank | None]:
    """Memories and momentum after a chunk."""
    span, rate, at = writes.span, writes.rate, slope_at(writes, initial, bank)
    renewed = None if span.fresh_BC is None else span.fresh_BC[:, -1]
    left = Bank(*(anchored(renewed, first, part) for first, part in zip(initial, bank, strict=True)))
    erased = -(rate * span.before_BHC).unsqueeze(-1) * at.before
    learnt = -rate.unsqueeze(-1) * at.back
    if old is None or writes.scalars is None:
        down, gate = (
            mix((span.whole_BH, was), (-1.0, new))
            for was, new in zip(left[1:], second_layer(at, rate * span.after_BHC), strict=True)
        )
        return Bank(mix((span.whole_BH, left.up), (1.0, (erased + learnt).mT @ writes.reach)), down, gate), None
    assert writes.momentum is not None
    speed = mix((writes.momentum, old.up), (1.0, learnt.mT @ writes.reach))
    up = mix((span.whole_BH, left.up), (1.0, erased.mT @ writes.reach)) + speed
    scalars = writes.scalars
    written, held = (second_layer(at, rate * weight) for weight in (scalars.write_BHC, scalars.hold_BHC))
    moved = [
        mix((span.whole_BH, was), (scalars.carry_BH, fast), (-1.0, new))
        for was, fast, new in zip(left[1:], old[1:], written, strict=True)
    ]
    speeds = [mix((scalars.left_BH, fast), (-1.0, new)) for fast, new in zip(old[1:], held, strict=True)]
    return Bank(up, *moved), Bank(speed, *speeds)


def block(
    tokens: Tokens, state: State, initial: Memories, gates: Gates, chunk: int, last: bool
) -> tuple[Tensor, State]:
    """One chunk of the makers, and in it the chunks of the main memory; the `last` chunk writes nothing."""
    (makers, main), count = state.memories, tokens.x.shape[2]
    said = made(tokens, initial.makers, makers, gates)
    shared = None if last else writes_of(said, tokens)
    maker_speed, main_speed = state.momentum or (None, None)
    outputs = []
    for first in range(0, count, chunk):
        part = tokens.part(first, chunk)
        fresh = None if part.starts is None else part.starts.cumsum(-1) > 0
        outputs.append(look(fresh, initial.main, main, part.q).vectors[:, :, 0])
        if not last or first + chunk < count:
            own = shared if count == chunk else writes_of(said.part(first, chunk), part)
            assert own is not None
            main, main_speed = write(main, main_speed, initial.main, own)
    if not last:
        assert shared is not None
        makers, maker_speed = write(makers, maker_speed, initial.makers, shared)
    momentum = Memories(maker_speed, main_speed) if maker_speed is not None and main_speed is not None else None
    return torch.cat(outputs, 2), State(Memories(makers, main), momentum)


def self_modifying(
    tokens: Tokens,
    chunks: tuple[int, int],
    initial: Memories,
    gates: Gates,
    state: State | None = None,
    hand_on: bool = True,
    recompute: int = 0,
) -> tuple[Tensor, State | None]:
    """Outputs (B, H, T, K) and the state after the last token.

    `chunks`: of the makers and of the main memory; the second divides the first, which divides T, or ValueError.
    `hand_on` false: nobody wants the state, the last chunk writes nothing and None is given. `recompute`: so many chunks
    of the makers are computed again in backward as one piece; 0: none.
    """
    count, (outer, inner) = tokens.x.shape[2], chunks
    if count % outer or outer % inner:
        raise ValueError(
            f"{count} tokens in chunks of {outer}, and those in chunks of {inner}: each must divide the one before"
        )
    state = state or begin(initial, tokens.log_momentum is not None)

    def run(piece: Tokens, state: State, last: bool) -> tuple[Tensor, State]:
        outputs, size = [], piece.x.shape[2]
        for first in range(0, size, outer):
            end = last and first + outer == size
            o, state = block(piece.part(first, outer), state, initial, gates, inner, end)
            outputs.append(o)
        return torch.cat(outputs, 2), state

    outputs, size = [], (recompute * outer or count)
    for first in range(0, count, size):
        piece, last = tokens.part(first, size), not hand_on and first + size >= count
        again = recompute and torch.is_grad_enabled()
        o, state = checkpoint(run, piece, state, last, use_reentrant=False) if again else run(piece, state, last)
        outputs.append(o)
    return torch.cat(outputs, 2), state if hand_on else None
