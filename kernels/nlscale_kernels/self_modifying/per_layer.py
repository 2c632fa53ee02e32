"""Delta Gradient Descent on both layers of a memory (spec 5B, B14): W1 erases along its own inputs, as W2 does along keys.

    W2 <- W2 (a I - e k k^T) - e g,   W1 <- W1 (a I - e u u^T) - e g,   u = s(W2 k) / |s(W2 k)| at the token's anchor

W1's inputs differ from memory to memory, so each needs a solve of its own: an ablation, several times slower. Momentum goes
from chunk to chunk on both layers, since erasing does not commute with a token's.

B rows, H heads, N memories, C tokens of a chunk, K head width, M units of a memory, O = K or 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.mlp_memory import Net, Step, moved, read
from nlscale_kernels.mlp_memory.reference import ACTIVATIONS
from nlscale_kernels.self_modifying.parts import Kind, Made
from nlscale_kernels.self_modifying.writes import Writes, joined, writes_of
from nlscale_kernels.span import anchored

EPS = 1e-20  # small beside squares of inputs that are hardly on


class Heard(NamedTuple):
    """What memories make of the tokens of a chunk at their anchors."""

    active: Tensor  # (B, H, N, C, M): W1's inputs
    error: Tensor  # (B, H, N, C, O)


def heard(net: Net, said: Made, activation: str) -> Heard:
    """Of tokens whose anchor is `net`."""
    key = said.k.unsqueeze(2)
    active = ACTIVATIONS[activation](key @ net.up.mT)
    error = active @ net.down.mT - read(net, said.v, activation)
    return Heard(active, error + key if net.adds else error)


def along_inputs(active: Tensor, said: Made, starts: Tensor | None, chunk: int) -> Writes:
    """How W1's writes arrive, every memory of a head a head of its own: (B, H N, ...); inputs of length one."""
    count = active.shape[2]
    folded = active.flatten(1, 2).split(chunk, 2)
    rate, keep = (part.repeat_interleave(count, 1).split(chunk, 2) for part in (said.rate, said.log_keep))
    begins = [None] * len(folded) if starts is None else starts.split(chunk, 1)
    each = zip(folded, rate, keep, begins, strict=True)
    return joined([writes_of(u, e, a, None, begin) for u, e, a, begin in each])


def write_both(
    net: Net,
    speed: Net | None,
    initial: Net,
    said: Made,
    starts: Tensor | None,
    learnt: Tensor,
    writes: Writes,
    kind: Kind,
    chunk: int,
) -> tuple[Net, Net | None]:
    """Memories and, if one asks for it, momentum after the tokens of `said`, whose writes on W2, `learnt`, are given.

    `chunk`: tokens of a solve for W1, which divides them.
    """
    at = heard(net, said, kind.activation)
    if writes.fresh_BC is not None:
        begun = heard(initial, said, kind.activation)
        fresh = writes.fresh_BC[:, None, None, :, None]
        at = Heard(*(torch.where(fresh, a, b) for a, b in zip(begun, at, strict=True)))
    length = (at.active.square().sum(-1, keepdim=True) + EPS).sqrt()
    own = along_inputs(at.active / length, said, starts, chunk)
    turn, reach = (part.unflatten(1, at.active.shape[1:3]) for part in (own.turn, own.reach))
    rate = said.rate.unsqueeze(2).unsqueeze(-1)
    written = (at.error * (-rate * length)).mT @ reach
    left = Net(*(anchored(writes.renewed_B, first, part) for first, part in zip(initial, net, strict=True)))
    carried = writes.carried if speed is not None else None
    up = Step(left.up @ writes.turn.unsqueeze(2), speed and speed.up, learnt, None, None, carried, None, 1.0, kind.clip)
    down = Step(left.down @ turn, speed and speed.down, written, None, None, carried, None, 1.0, kind.clip)
    (after_up, then_up), (after_down, then_down) = moved(up), moved(down)
    momentum = None if then_up is None or then_down is None else Net(then_up, then_down)
    return Net(after_up, after_down), momentum
