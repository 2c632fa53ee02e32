"""One move of levels over flat memory, in plain torch: what the kernels are held against, and the path on a CPU.

Tensors are one-dimensional and laid out alike; float32, or float64 all of them. `blocks` names the row of `table` that each
BLOCK elements follow; without it all follow the first. `copy` is the weight in the precision that the model computes with.
Each function changes its tensors in place, works on pieces that stay in the cache, and gives what it says for each block.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from nlscale_kernels.level_step.table import BLOCK, AdamW, Descend, Momenta

PIECE = 256 * BLOCK
Row = TypeVar("Row", AdamW, Momenta, Descend)


def adamw(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    table: Tensor,
    blocks: Tensor | None = None,
    clear: bool = False,
) -> Tensor:
    """AdamW (Loshchilov and Hutter, 2019) with decoupled decay: the squared change of each block.

    With g = scale gradient: m += (1 - b1)(g - m), v += (1 - b2)(g^2 - v), and

        w = (1 - rate decay) w - rate correct1 m / (correct2 sqrt(v) + eps)

    `clear`: gradients of levels that moved are set to zero.
    """

    def move(row: AdamW, piece: slice) -> Tensor:
        w, m, v, g = master[piece], first[piece], second[piece], gradient[piece].to(master.dtype) * row.scale
        m.lerp_(g, 1 - row.beta1)
        v.mul_(row.beta2).addcmul_(g, g, value=1 - row.beta2)
        root = v.sqrt().mul_(row.correct2).add_(row.eps)
        change = torch.div(m, root, out=root).mul_(-row.rate * row.correct1).add_(w, alpha=-row.rate * row.decay)
        w.add_(change)
        return finish(w, change, gradient[piece], None if copy is None else copy[piece], clear)

    return each(AdamW, move, master, table, blocks)


def momenta(
    gradient: Tensor,
    momentum: Tensor,
    total: Tensor | None,
    slow: Tensor | None,
    table: Tensor,
    blocks: Tensor | None = None,
    clear: bool = False,
) -> None:
    """What Muon and M3 gather of gradients before they orthogonalise (spec 2.10): see table.Momenta.

    `total`: the sum of gradients since the slow momentum last moved; zero after it moves.
    """

    def move(row: Momenta, piece: slice) -> Tensor:
        g = gradient[piece].to(momentum.dtype) * row.scale
        momentum[piece].mul_(row.keep).add_(g, alpha=row.gain)
        if total is not None and slow is not None:
            total[piece].add_(g)
            if row.slow_fire:
                slow[piece].mul_(row.slow_keep).add_(total[piece], alpha=row.slow_gain)
                total[piece].zero_()
        if clear:
            gradient[piece].zero_()
        return g.new_zeros(0)

    each(Momenta, move, momentum, table, blocks)


def descend(
    master: Tensor, direction: Tensor, copy: Tensor | None, table: Tensor, blocks: Tensor | None = None
) -> Tensor:
    """w = (1 - rate decay) w - rate direction: the squared change of each block."""

    def move(row: Descend, piece: slice) -> Tensor:
        w = master[piece]
        change = torch.mul(direction[piece].to(w.dtype), -row.rate).add_(w, alpha=-row.rate * row.decay)
        w.add_(change)
        return finish(w, change, None, None if copy is None else copy[piece], False)

    return each(Descend, move, master, table, blocks)


def finish(w: Tensor, change: Tensor, gradient: Tensor | None, copy: Tensor | None, clear: bool) -> Tensor:
    """Copies, clears, and gives the squared change of each block of a piece."""
    if copy is not None:
        copy.copy_(w)
    if clear and gradient is not None:
        gradient.zero_()
    full = len(change) // BLOCK * BLOCK
    squares = change.square_()
    whole = squares[:full].view(-1, BLOCK).sum(1)
    return whole if full == len(change) else torch.cat([whole, squares[full:].sum().view(1)])


def each(
    kind: type[Row], move: Callable[[Row, slice], Tensor], like: Tensor, table: Tensor, blocks: Tensor | None
) -> Tensor:
    """Moves all pieces of levels that fire; zeros for the others' blocks."""
    rows = [kind(*row) for row in table.tolist()]
    told = like.new_zeros(-(-len(like) // BLOCK))
    for row, piece in pieces(len(like), [0] if blocks is None else blocks.tolist()):
        if rows[row].fire:
            said = move(rows[row], piece)
            told[piece.start // BLOCK : piece.start // BLOCK + len(said)] = said
    return told


def pieces(elements: int, blocks: list[int]) -> Iterator[tuple[int, slice]]:
    """Runs of elements that follow one row of the table, none longer than PIECE."""
    start = 0
    while start < elements:
        block = start // BLOCK
        row, stop = blocks[min(block, len(blocks) - 1)], min(start + PIECE, elements)
        if len(blocks) > 1:
            same = block
            while same < len(blocks) and blocks[same] == row:
                same += 1
            stop = min(stop, same * BLOCK)
        yield row, slice(start, stop)
        start = stop
