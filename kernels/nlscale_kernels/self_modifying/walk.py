"""The main memory over the chunks of a run of tokens: what it says to the queries, and how writes move it.

B rows, H heads, T tokens, C tokens of a chunk, K head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlscale_kernels.mlp_memory import Net, Step, gathered, moved, read
from nlscale_kernels.self_modifying.parts import Made, Moving, Tokens
from nlscale_kernels.self_modifying.writes import Writes
from nlscale_kernels.span import anchored


def look(fresh: Tensor | None, initial: Net, net: Net, z: Tensor) -> Tensor:
    """What the memories at each token's anchor say to z (B, H, N, C, O)."""
    said = read(net, z)
    return said if fresh is None else torch.where(fresh[:, None, None, :, None], read(initial, z), said)


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


def walk(
    tokens: Tokens, said: Made, all_writes: Sequence[Writes], main: Moving, initial: Net, clip: float, chunk: int
) -> tuple[Tensor, Moving]:
    """What the main memory says (B, H, T, K), and where it is after the chunks that write, the first ones.

    `said`: of those chunks at least. `clip`: see Gates.
    """
    net, speed = main
    outputs, makers = [], said.runs(chunk)
    for place, part in enumerate(tokens.runs(chunk)):
        outputs.append(look(part.fresh, initial, net, part.q)[:, :, 0])
        if place < len(all_writes):
            net, speed = write(net, speed, initial, makers[place], all_writes[place], chunk, clip)
    return whole(outputs), (net, speed)


def whole(outputs: list[Tensor]) -> Tensor:
    """Runs of tokens (B, H, C, K) as one; a single one is not copied."""
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
