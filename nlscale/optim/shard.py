"""A shard: what one rank keeps of a group's optimizer state, and the seam behind which state is sharded.

    total   this rank's part of the windows' sum over replicas   (a collective)
    update  the rule, on this rank's part                         (local)
    gather  the new weights to every replica                      (a collective, behind the next forward)
    arrive  waits for them, just before they are used

Three sharders serve it: DeepSpeed's ZeRO-1 (optim/zero.py), megatron-core's buffers (optim/buffers.py), which reduce
behind backward, and one for a rank that shares its leaves with nobody (optim/alone.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nlscale.config.levels import Level
from nlscale.optim.layout import Flat
from nlscale.optim.rules import Rule
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World

PIECE = 2**16  # elements that a CPU widens at a time: the wider copy stays in its cache


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one leaf's local elements that this rank's shard owns."""

    leaf: Leaf
    start: int  # in the leaf's local elements, row-major
    values: dict[str, Tensor]  # "weight" and the rule's state: flat views of the shard


class Sharder(Protocol):
    """A level's (or phase's, or bucket's) leaves, sharded over replicas."""

    level: Level
    leaves: list[Leaf]
    flats: list[Flat]
    rules: list[Rule]
    counted: list[list[slice]]  # by flat: see `counted`
    bytes_a_reduce: int
    bytes_a_gather: int

    def total(self) -> list[Tensor]:
        """This rank's part of the windows' sum over all replicas, one tensor a flat; the windows are zero after."""

    def update(self, grads: Sequence[Tensor], rate: float, scale: float) -> Tensor:
        """Applies each flat's rule to `scale` x its gradients; the squared norm of the change that counts here."""

    def write(self, everything: bool = False) -> None:
        """Writes what this rank sends, where no rule has done so."""

    def gather(self) -> None:
        """Begins to send this rank's part of the weights to every replica."""

    def arrive(self) -> None:
        """Waits for `gather`; the model computes with the new weights."""


def parts(flat: Flat, replica: int, replicas: int) -> Iterator[tuple[Leaf, int, slice]]:
    """What a replica's part of a flat holds (see Flat.runs)."""
    size = flat.elements // replicas
    return flat.runs(replica * size, (replica + 1) * size)


def fragments(shard: Sharder, world: World) -> Iterator[Fragment]:
    """What this rank owns of each leaf: master weight and the rule's state."""
    for flat, rule in zip(shard.flats, shard.rules, strict=True):
        tensors = {"weight": rule.master.data, **rule.state}
        for leaf, start, span in parts(flat, world.copy, world.copies):
            yield Fragment(leaf, start, {name: tensor[span] for name, tensor in tensors.items()})


def counted(flat: Flat, world: World) -> list[slice]:
    """The elements of this rank's part that norms count here: each element of the model counts on one rank.

    Leaves that all tensor-parallel ranks hold count on the first, tied ones on the first pipeline stage.
    """
    spans: list[slice] = []
    for leaf, _, span in parts(flat, world.copy, world.copies):
        if leaf.twin or (leaf.shard is None and world.tensor_rank):
            continue
        if spans and spans[-1].stop == span.start:
            spans[-1] = slice(spans[-1].start, span.stop)
        else:
            spans.append(span)
    return spans


def square(tensors: Sequence[Tensor], spans: Sequence[Sequence[slice]]) -> Tensor:
    """Sum of squares over the spans of each tensor: a float64 scalar."""
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.float64)
        for tensor, held in zip(tensors, spans, strict=True)
        for span in held
        for piece in tensor[span].split(PIECE if tensor.is_cpu else max(1, len(tensor)))
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    return torch.stack(norms).square_().sum()
