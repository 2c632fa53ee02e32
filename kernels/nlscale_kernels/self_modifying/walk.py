"""The main memory over the chunks of a run of tokens: what it says to the queries, and how writes move it.

B rows, H heads, T tokens, C tokens of a chunk, K head width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.mlp_memory import Net, Step, moved, read, self_taught
from nlscale_kernels.self_modifying.parts import Kind, Made, Moving, Tokens
from nlscale_kernels.self_modifying.per_layer import write_both
from nlscale_kernels.self_modifying.writes import Writes
from nlscale_kernels.span import anchored


def look(fresh: Tensor | None, initial: Net, net: Net, z: Tensor, activation: str) -> Tensor:
    """What the memories at each token's anchor say to z (B, H, N, C, O)."""
    said = read(net, z, activation)
    return said if fresh is None else torch.where(fresh[:, None, None, :, None], read(initial, z, activation), said)


class Lesson(NamedTuple):
    """What tokens teach a memory whose state is their anchor: to answer their keys as it answers their values."""

    k: Tensor  # (B, H, C, K)
    v: Tensor  # (B, H, C, K)
    reach: Tensor  # (B, H, C, K): where each token's write on W2 arrives
    share: Tensor  # (B, H, C): and how much of it
    weights: list[Tensor]  # (B, H, C): how much of each token's write is in W1 and, where one asks, in its momentum

    def runs(self, size: int) -> list["Lesson"]:
        """Runs of `size` tokens."""
        if self.k.shape[2] <= size:
            return [self]
        parts = [x.split(size, 2) for x in (*self[:4], *self.weights)]
        return [Lesson(k, v, reach, share, weights) for k, v, reach, share, *weights in zip(*parts, strict=True)]


def lesson(said: Made, writes: Writes, mark: Tensor | float = 1.0) -> Lesson:
    """Of the tokens where `mark` (B, 1, T) is not zero."""
    rate = said.rate * mark
    weights = [rate * writes.scalars.write_BHC]
    weights += [] if writes.momentum is None or writes.ends else [rate * writes.scalars.hold_BHC]
    return Lesson(said.k, said.v, writes.reach, -rate, weights)


def lessons(said: Made, writes: Writes) -> list[Lesson]:
    """Of tokens whose anchor is the memory's state, and where documents begin of those whose anchor is the initial one."""
    if writes.fresh_BC is None:
        return [lesson(said, writes)]
    fresh = writes.fresh_BC.to(said.rate.dtype).unsqueeze(1)
    return [lesson(said, writes, 1 - fresh), lesson(said, writes, fresh)]


def gradients(net: Net, given: Lesson, piece: int, activation: str) -> list[Tensor]:
    """What is written on W2 and, once for each kind of weight, on W1; `piece` tokens are worked on at a time."""
    total: list[Tensor] = []
    for part in given.runs(piece):
        first, second = self_taught(net, *part, activation)
        each = [first, *second]
        total = [a + b for a, b in zip(total, each, strict=True)] if total else each
    return total


def learned(net: Net, initial: Net, taught: list[Lesson], piece: int, activation: str) -> list[Tensor]:
    """`gradients` of all lessons together."""
    apart = [gradients(each, given, piece, activation) for each, given in zip((net, initial), taught, strict=False)]
    return apart[0] if len(apart) == 1 else [a + b for a, b in zip(*apart, strict=True)]


def write(
    net: Net, speed: Net | None, initial: Net, taught: list[Lesson], writes: Writes, piece: int, kind: Kind
) -> tuple[Net, Net | None]:
    """Memories and, if one asks for it, momentum after a chunk; see Gates."""
    learnt, written, *rest = learned(net, initial, taught, piece, kind.activation)
    left = Net(*(anchored(writes.renewed_B, first, part) for first, part in zip(initial, net, strict=True)))
    turned = (left.up.flatten(2, 3) @ writes.turn).unflatten(2, left.up.shape[2:4])
    scalars, carried = writes.scalars, writes.carried
    up = Step(turned, None, learnt, None, None, None, None, 1.0, kind.clip)
    down = Step(left.down, None, written, None, scalars.whole_BH, None, None, -1.0, kind.clip)
    if speed is not None:
        up = up._replace(speed=speed.up, carry=carried)
        down = down._replace(speed=speed.down, carry=scalars.carry_BH)
        down = down._replace(held=rest[0], left=scalars.left_BH) if rest else down
    (after_up, then_up), (after_down, then_down) = moved(up), moved(down)
    momentum = None if then_up is None or then_down is None else Net(then_up, then_down)
    return Net(after_up, after_down), momentum


Writer = Callable[[Net, Net | None, Net], tuple[Net, Net | None]]


def writer(said: Made, starts: Tensor | None, writes: Writes, chunk: int, piece: int, kind: Kind) -> Writer:
    """What writes the same tokens into memories, given with their momentum and their initial state.

    `chunk`: tokens of a solve; `piece`: tokens that are worked on at a time.
    """
    taught = lessons(said, writes)

    def write_layers(net: Net, speed: Net | None, initial: Net) -> tuple[Net, Net | None]:
        first, *_ = learned(net, initial, taught, piece, kind.activation)
        return write_both(net, speed, initial, said, starts, first, writes, kind, chunk)

    return write_layers if kind.per_layer else partial(write, taught=taught, writes=writes, piece=piece, kind=kind)


def walk(
    tokens: Tokens, said: Made, all_writes: Sequence[Writes], main: Moving, initial: Net, kind: Kind, chunk: int
) -> tuple[Tensor, Moving]:
    """What the main memory says (B, H, T, K), and where it is after the chunks that write, the first ones.

    `said`: of those chunks at least. `kind`: see Gates.
    """
    net, speed = main
    outputs, makers = [], said.runs(chunk)
    for place, part in enumerate(tokens.runs(chunk)):
        outputs.append(look(part.fresh, initial, net, part.q, kind.activation)[:, :, 0])
        if place < len(all_writes):
            net, speed = writer(makers[place], part.starts, all_writes[place], chunk, chunk, kind)(net, speed, initial)
    return whole(outputs), (net, speed)


def whole(outputs: list[Tensor]) -> Tensor:
    """Runs of tokens (B, H, C, K) as one; a single one is not copied."""
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
