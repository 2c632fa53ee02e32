"""Self-modifying Titans: memories that write their own keys, values, rates and decay (spec 2.6; eqs. 83-93, corrected).

Five memories a head: key, value, rate, keep and main. With x_t the token's input and every M at the token's anchor,

    k = M_key(x) / |.|    v = M_value(x) / |.|    e = e_max sigmoid(M_rate(x) + b)    a = sigmoid(M_keep(x) + b)
    o = M_main(q)         target of memory M: M(v), taken as given;  gradient g of |M(k) - M(v)|^2 / 2
    q: given, or of a sixth memory, M_query(x) / |.|, which is written like the others
    W2 <- W2 (a I - e k k^T) - e g,   W1 <- a W1 - e g      Delta Gradient Descent on the layer that k enters
    (per_layer.py: on both)

The paper leaves v as long as it comes (`Gates.unit_values` false). Its target M(v) is then long where v is, a memory that
learns it makes longer values still, and within a few hundred tokens they can grow without bound; of length one they do not.

The anchor is the state before the chunk, or the initial state where the document began inside the chunk. The main memory
may have shorter chunks than the four that make its keys, values and gates. Momentum (Titans): on W1 token by token, on W2
chunk by chunk. What a chunk does to any W2 is W2 turn + (its writes) reach (writes.py), the same for all five memories.

A row may come in parts of any length: the tokens of a makers' chunk that is not whole yet have been read, and wait in the
state; in it the main memory walks on by chunks of its own.

B rows, H heads, T tokens, C tokens of a chunk, K head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale_kernels.arguments import check_divides
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.recompute import recomputed
from nlscale_kernels.runs import after, cut
from nlscale_kernels.self_modifying.parts import (
    Caller,
    Gates,
    Made,
    Memories,
    Moving,
    State,
    Tokens,
    begin,
    directly,
)
from nlscale_kernels.self_modifying.resident import walk
from nlscale_kernels.self_modifying.walk import look, whole, writer
from nlscale_kernels.self_modifying.walk import walk as walk_by_chunks
from nlscale_kernels.self_modifying.writes import Writes, joined, writes_of
from nlscale_kernels.unit import unit

# tokens of a makers' chunk that are worked on at a time, at least: fewer calls, and more memory while it lasts
PIECE = 256


def made(x: Tensor, fresh: Tensor | None, initial: Memories, now: Memories, gates: Gates) -> Made:
    """What the makers say to inputs (B, H, C, K); `fresh` (B, C): where they are those that a document begins with."""
    k, v = look(fresh, part(initial.vectors, 0, 2), part(now.vectors, 0, 2), x, gates.activation).unbind(2)
    rate, keep = look(fresh, initial.gates, now.gates, x, gates.activation).squeeze(-1).unbind(2)
    rate = gates.rate_max * torch.sigmoid(rate + gates.rate_bias[:, None])
    return Made(unit(k), unit(v) if gates.unit_values else v, rate, F.logsigmoid(keep + gates.keep_bias[:, None]))


def asked(x: Tensor, fresh: Tensor | None, initial: Memories, now: Memories, gates: Gates) -> Tensor:
    """Queries that the third memory of vectors makes (B, H, C, K)."""
    nets = part(initial.vectors, 2, 3), part(now.vectors, 2, 3)
    return unit(look(fresh, *nets, x, gates.activation)[:, :, 0])


def told(tokens: Tokens, said: Made, chunk: int, erase: float) -> list[Writes]:
    """How the writes of each chunk arrive at its end."""
    return [
        writes_of(own.k, own.rate, own.log_keep, each.log_momentum, each.starts, erase)
        for each, own in zip(tokens.runs(chunk), said.runs(chunk), strict=True)
    ]


def part(net: Net, first: int, last: int) -> Net:
    """Some of the memories of a kind."""
    return net if net.up.shape[2] == last - first else Net(net.up[:, :, first:last], net.down[:, :, first:last])


def held(still: Tensor | bool | None, old: Net, new: Net) -> Net:
    """`new` but for the memories that stay as they were."""
    if not isinstance(still, Tensor):
        return new
    return Net(*(torch.where(still[:, None, None], a, b) for a, b in zip(old, new, strict=True)))


def block(
    tokens: Tokens,
    state: State,
    initial: Memories,
    gates: Gates,
    chunk: int,
    walked: int,
    left: int | None,
    call: Caller,
) -> tuple[Tensor, State]:
    """One chunk of the makers, and in it the chunks of the main memory, which has `walked` the first tokens already.

    `left`: how many more come, of which the last chunk writes nothing; None: the state is handed on.
    `call` runs the parts that are worth computing again in backward: not the writes, which are slow to find and small.
    """
    size, last, fresh = tokens.x.shape[2], left == 0, tokens.fresh
    if initial.vectors.up.shape[2] > 2:
        tokens = tokens._replace(q=call(asked, tokens.x, fresh, initial, state.memories, gates))
    writing = size - chunk * last  # what is said of tokens that write nothing would be heard by nobody
    said, all_writes = Made.nothing(tokens), []
    if writing:
        writers, where = (tokens, fresh) if writing == size else (cut(tokens, 0, writing), those(fresh, 0, writing))
        said = call(made, writers.x, where, initial, state.memories, gates)
        all_writes = told(writers, said, chunk, gates.erase)
    speeds = state.momentum or (None, None, None)
    main_writes = [] if gates.still.main else all_writes[walked // chunk :]
    if main_writes and (last or left == 1 and size == chunk):
        main_writes[-1] = main_writes[-1]._replace(ends=True)
    before = state.memories.main, speeds[2]
    heard = (cut(tokens, walked), cut(said, walked)) if walked else (tokens, said)
    outputs, main = call(walk, *heard, main_writes, before, initial.main, gates.kind, chunk)
    makers: list[Moving] = [(state.memories.vectors, speeds[0]), (state.memories.gates, speeds[1])]
    if not last:
        makers = call(move, said, tokens.starts, all_writes, makers, initial, gates, chunk, left == 1)
    memories, momenta = (Memories(*each) for each in zip(*makers, main, strict=True))
    return outputs, State(memories, momenta if state.momentum else None)


def those(fresh: Tensor | None, first: int, last: int | None = None) -> Tensor | None:
    """`fresh` of the tokens `first` ... `last`, None: all that follow."""
    return None if fresh is None else fresh[:, first:last]


def begun(
    tokens: Tokens, state: State, initial: Memories, gates: Gates, chunk: int, walked: int
) -> tuple[Tensor, State]:
    """A makers' chunk that is not whole yet: what is said to the tokens from `walked` on, up to which the main memory has
    passed them already. It walks on by whole chunks of its own, and the makers wait.
    """
    count, (now, speeds, _) = tokens.x.shape[2], state
    fresh, onward, writing = tokens.fresh, cut(tokens, walked), count - count % chunk
    if initial.vectors.up.shape[2] > 2:
        onward = onward._replace(q=asked(onward.x, those(fresh, walked), initial, now, gates))
    said, all_writes = Made.nothing(tokens), []
    if writing > walked and not gates.still.main:
        writers = cut(tokens, walked, writing)
        said = made(writers.x, those(fresh, walked, writing), initial, now, gates)
        all_writes = told(writers, said, chunk, gates.erase)
    before = now.main, None if speeds is None else speeds.main
    o, (main, speed) = walk_by_chunks(onward, said, all_writes, before, initial.main, gates.kind, chunk)
    momenta = None if speeds is None or speed is None else speeds._replace(main=speed)
    return o, State(now._replace(main=main), momenta, tokens)


def move(
    said: Made,
    starts: Tensor | None,
    all_writes: Sequence[Writes],
    makers: list[Moving],
    initial: Memories,
    gates: Gates,
    chunk: int,
    ends: bool,
) -> list[Moving]:
    """The makers after their chunk, the writes of whose pieces, of `chunk` tokens, are given; `ends`: see Writes."""
    writes, moved_on = joined(all_writes)._replace(ends=ends), []
    write = writer(said, starts, writes, chunk, max(chunk, PIECE), gates.kind)
    for (net, speed), first, still in zip(makers, initial[:2], gates.still[:2], strict=True):
        if still is True:
            moved_on.append((net, speed))
            continue
        new, then = write(net, speed, first)
        moved_on.append((held(still, net, new), then))
    return moved_on


def self_modifying(
    tokens: Tokens,
    chunks: tuple[int, int],
    initial: Memories,
    gates: Gates,
    state: State | None = None,
    hand_on: bool = True,
    recompute: bool = False,
) -> tuple[Tensor, State | None]:
    """Outputs (B, H, T, K) and the state after the last token; a third memory of vectors makes the queries.

    `chunks`: of the makers and of the main memory; the second divides the first, or ValueError. `hand_on` false: nobody
    wants the state, the last chunk writes nothing and None is given. `recompute`: backward computes each chunk of the
    makers again, but for the solves.
    """
    outer, inner = chunks
    check_divides(inner, outer, " of the makers' chunk")
    state = state or begin(initial.copied(tokens.x.shape[0]), tokens.log_momentum is not None)
    call: Caller = recomputed if recompute and torch.is_grad_enabled() else directly
    waiting = 0 if state.pending is None else state.pending.x.shape[2]
    walked = known = waiting - waiting % inner
    outputs, pieces = [], after(state.pending, tokens).runs(outer)
    rest = pieces.pop() if pieces[-1].x.shape[2] < outer else None
    for place, piece in enumerate(pieces, 1):
        left = None if hand_on or rest is not None else len(pieces) - place
        o, state = block(piece, state, initial, gates, inner, walked, left, call)
        outputs.append(o)
        walked = 0
    if rest is not None:
        o, state = begun(rest, state, initial, gates, inner, walked)
        outputs.append(o)
    return whole(outputs)[:, :, waiting - known :], state if hand_on else None
