"""Self-modifying Titans: memories that write their own keys, values, rates and decay (spec 2.6; eqs. 83-93, corrected).

Five memories a head: key, value, rate, keep and main. With x_t the token's input and every M at the token's anchor,

    k = M_key(x) / |.|    v = M_value(x) / |.|    e = e_max sigmoid(M_rate(x) + b)    a = sigmoid(M_keep(x) + b)
    o = M_main(q)         target of memory M: M(v), taken as given;  gradient g of |M(k) - M(v)|^2 / 2
    W2 <- W2 (a I - e k k^T) - e g,   W1 <- a W1 - e g      Delta Gradient Descent on the layer that k enters

The paper leaves v as long as it comes (`Gates.unit_values` false). Its target M(v) is then long where v is, a memory that
learns it makes longer values still, and within a few hundred tokens they can grow without bound; of length one they do not.

The anchor is the state before the chunk, or the initial state where the document began inside the chunk. The main memory
may have shorter chunks than the four that make its keys, values and gates. Momentum (Titans): on W1 token by token, on W2
chunk by chunk. What a chunk does to any W2 is W2 turn + (its writes) reach (writes.py), the same for all five memories.

B rows, H heads, T tokens, C tokens of a chunk, K head width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlscale_kernels.mlp_memory import Net, Step, gathered, moved, read
from nlscale_kernels.self_modifying.writes import Writes, joined, writes_of
from nlscale_kernels.span import anchored
from nlscale_kernels.unit import unit


class Tokens(NamedTuple):
    """What a run of tokens brings; log_momentum None: no momentum; starts None: no document begins."""

    x: Tensor  # (B, H, T, K)
    q: Tensor  # (B, H, T, K)
    log_momentum: Tensor | None = None  # (B, H, T)
    starts: Tensor | None = None  # (B, T)

    def runs(self, size: int) -> list["Tokens"]:
        """Runs of `size` tokens; one backward of a split is one copy, of a slice a row of zeros."""
        count = -(-self.x.shape[2] // size)
        if count == 1:
            return [self]
        x, q, momentum = ([None] * count if t is None else t.split(size, 2) for t in self[:3])
        starts = [None] * count if self.starts is None else self.starts.split(size, 1)
        return [Tokens(*each) for each in zip(x, q, momentum, starts, strict=True)]  # type: ignore[arg-type]

    @property
    def fresh(self) -> Tensor | None:
        """True where a token's document began among these tokens (B, T)."""
        return None if self.starts is None else self.starts.cumsum(-1) > 0


class Memories(NamedTuple):
    """The five memories of every head."""

    vectors: Net  # key, value
    gates: Net  # rate, keep
    main: Net


class State(NamedTuple):
    """The memories and, where there is momentum, theirs."""

    memories: Memories
    momentum: Memories | None


class Still(NamedTuple):
    """Which memories stay as they began: true, one a memory of each net; None: all are written."""

    vectors: Tensor | None = None
    gates: Tensor | None = None
    main: Tensor | None = None


Moving = tuple[Net, Net | None]  # memories and their momentum
Caller = Callable[..., Any]  # runs a function on arguments


class Gates(NamedTuple):
    """Slow constants of a head, each (H,), and what is left out of the rule."""

    rate_bias: Tensor
    keep_bias: Tensor
    rate_max: float
    erase: float = 1.0  # see writes_of
    unit_values: bool = True  # values of length one; false: as the memory says them
    clip: float = 0.0  # largest Frobenius norm of what a chunk adds to a matrix; 0: any
    still: Still = Still()


class Made(NamedTuple):
    """What the makers say of the tokens of a chunk: keys and values (B, H, C, K), rates and log a (B, H, C)."""

    k: Tensor
    v: Tensor
    rate: Tensor
    log_keep: Tensor

    def runs(self, size: int) -> list["Made"]:
        """Runs of `size` tokens."""
        if self.k.shape[2] <= size:
            return [self]
        return [Made(*each) for each in zip(*(part.split(size, 2) for part in self), strict=True)]


def directly(run: Callable[..., Any], *args: Any) -> Any:
    """The Caller that keeps everything for backward."""
    return run(*args)


def begin(initial: Memories, momentum: bool) -> State:
    """The state before any token; `initial` has a row dimension of 1."""
    zero = Memories(*(Net(*(torch.zeros_like(part) for part in net)) for net in initial))
    return State(initial, zero if momentum else None)


def look(fresh: Tensor | None, initial: Net, net: Net, z: Tensor) -> Tensor:
    """What the memories at each token's anchor say to z (B, H, N, C, O)."""
    said = read(net, z)
    return said if fresh is None else torch.where(fresh[:, None, None, :, None], read(initial, z), said)


def made(tokens: Tokens, initial: Memories, now: Memories, gates: Gates) -> Made:
    """What the makers say."""
    k, v = look(tokens.fresh, initial.vectors, now.vectors, tokens.x).unbind(2)
    rate, keep = look(tokens.fresh, initial.gates, now.gates, tokens.x).squeeze(-1).unbind(2)
    rate = gates.rate_max * torch.sigmoid(rate + gates.rate_bias[:, None])
    return Made(unit(k), unit(v) if gates.unit_values else v, rate, F.logsigmoid(keep + gates.keep_bias[:, None]))


def gradients(net: Net, said: Made, writes: Writes, mark: Tensor | float, piece: int) -> list[Tensor]:
    """What tokens write on W2 and, once for each kind of weight, on W1, where `mark` (B, 1, T) is not zero.

    `piece` tokens are worked on at a time.
    """
    rate = said.rate * mark
    shares = [rate * writes.scalars.write_BHC]
    shares += [] if writes.momentum is None else [rate * writes.scalars.hold_BHC]
    reach = -rate.unsqueeze(-1) * writes.reach
    total: list[Tensor] = []
    given = (said.k, said.v, reach, *shares)
    pieces = zip(*(x.split(piece, 2) for x in given), strict=True) if said.k.shape[2] > piece else [given]
    for k, v, arrives, *weights in pieces:
        first, second = gathered(net, k, read(net, v), arrives, weights)
        each = [first, *second]
        total = [a + b for a, b in zip(total, each, strict=True)] if total else each
    return total


def write(
    net: Net, speed: Net | None, initial: Net, said: Made, writes: Writes, piece: int, clip: float
) -> tuple[Net, Net | None]:
    """Memories and momentum after a chunk; see `Gates.clip`."""
    if writes.fresh_BC is None:
        learnt, written, *rest = gradients(net, said, writes, 1.0, piece)
    else:  # a gradient is taken at the token's anchor
        fresh = writes.fresh_BC.to(said.rate.dtype).unsqueeze(1)
        apart = (gradients(initial, said, writes, fresh, piece), gradients(net, said, writes, 1 - fresh, piece))
        learnt, written, *rest = (a + b for a, b in zip(*apart, strict=True))
    left = Net(*(anchored(writes.renewed_B, first, part) for first, part in zip(initial, net, strict=True)))
    turned = (left.up.flatten(2, 3) @ writes.turn).unflatten(2, left.up.shape[2:4])
    scalars, carried = writes.scalars, writes.carried
    up = Step(turned, None, learnt, None, None, None, None, 1.0, clip)
    down = Step(left.down, None, written, None, scalars.whole_BH, None, None, -1.0, clip)
    if speed is not None:
        up = up._replace(speed=speed.up, carry=carried)
        carry, remains = scalars.carry_BH, scalars.left_BH
        down = down._replace(speed=speed.down, held=rest[0], carry=carry, left=remains)
    (after_up, then_up), (after_down, then_down) = moved(up), moved(down)
    momentum = None if then_up is None or then_down is None else Net(then_up, then_down)
    return Net(after_up, after_down), momentum


def held(still: Tensor | None, old: Net, new: Net) -> Net:
    """`new` but for the memories that stay as they were."""
    if still is None:
        return new
    return Net(*(torch.where(still[:, None, None], a, b) for a, b in zip(old, new, strict=True)))


def block(
    tokens: Tokens, state: State, initial: Memories, gates: Gates, chunk: int, last: bool, call: Caller
) -> tuple[Tensor, State]:
    """One chunk of the makers, and in it the chunks of the main memory; the `last` chunk writes nothing.

    `call` runs the parts that are worth computing again in backward: not the writes, which are slow to find and small.
    """
    said = call(made, tokens, initial, state.memories, gates)
    parts = list(zip(tokens.runs(chunk), said.runs(chunk), strict=True))
    all_writes = [
        writes_of(own.k, own.rate, own.log_keep, part.log_momentum, part.starts, gates.erase)
        for part, own in (parts[:-1] if last else parts)
    ]
    speeds = state.momentum or (None, None, None)
    outputs, main = call(walk, tokens, said, all_writes, (state.memories.main, speeds[2]), initial.main, gates, chunk)
    makers: list[Moving] = [(state.memories.vectors, speeds[0]), (state.memories.gates, speeds[1])]
    if not last:
        makers = call(move, said, joined(all_writes), makers, initial, gates, chunk)
    memories, momenta = (Memories(*each) for each in zip(*makers, main, strict=True))
    return outputs, State(memories, momenta if state.momentum else None)


def walk(
    tokens: Tokens, said: Made, all_writes: Sequence[Writes], main: Moving, initial: Net, gates: Gates, chunk: int
) -> tuple[Tensor, Moving]:
    """What the main memory says, chunk by chunk, and where it is after the chunks that write."""
    net, speed = main
    outputs = []
    runs = zip(tokens.runs(chunk), said.runs(chunk), strict=True)
    for (part, own), writes in zip_longest(runs, all_writes):
        outputs.append(look(part.fresh, initial, net, part.q)[:, :, 0])
        if writes is not None:
            new, speed = write(net, speed, initial, own, writes, chunk, gates.clip)
            net = held(gates.still.main, net, new)
    return whole(outputs), (net, speed)


def move(said: Made, writes: Writes, makers: list[Moving], initial: Memories, gates: Gates, piece: int) -> list[Moving]:
    """The makers after their chunk."""
    moved_on = []
    for (net, speed), first, still in zip(makers, initial[:2], gates.still[:2], strict=True):
        new, then = write(net, speed, first, said, writes, piece, gates.clip)
        moved_on.append((held(still, net, new), then))
    return moved_on


def whole(outputs: list[Tensor]) -> Tensor:
    """Runs of tokens (B, H, C, K) as one; a single one is not copied."""
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]


def self_modifying(
    tokens: Tokens,
    chunks: tuple[int, int],
    initial: Memories,
    gates: Gates,
    state: State | None = None,
    hand_on: bool = True,
    recompute: bool = False,
) -> tuple[Tensor, State | None]:
    """Outputs (B, H, T, K) and the state after the last token.

    `chunks`: of the makers and of the main memory; the second divides the first, which divides T, or ValueError.
    `hand_on` false: nobody wants the state, the last chunk writes nothing and None is given. `recompute`: backward computes
    each chunk of the makers again, but for the solves.
    """
    count, (outer, inner) = tokens.x.shape[2], chunks
    if count % outer or outer % inner:
        raise ValueError(
            f"{count} tokens in chunks of {outer}, and those in chunks of {inner}: each must divide the one before"
        )
    state = state or begin(initial, tokens.log_momentum is not None)
    call: Caller = partial(checkpoint, use_reentrant=False) if recompute and torch.is_grad_enabled() else directly
    outputs, pieces = [], tokens.runs(outer)
    for place, piece in enumerate(pieces, 1):
        o, state = block(piece, state, initial, gates, inner, not hand_on and place == len(pieces), call)
        outputs.append(o)
    return whole(outputs), state if hand_on else None
