"""Context parallelism: each rank holds a part of every row's tokens; what must see whole rows trades tokens for heads.

Two all-to-alls a mixer (spec 3.9): before it, all tokens of this rank's share of the heads come in; after it, all heads of
this rank's tokens go back. Levels that move inside rows need whole ones, and trade tokens for rows, once. On one rank
nothing happens.

T tokens of a row, R ranks, B rows, F features of all heads that this tensor-parallel rank holds.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor


class Group(Protocol):
    """A process group, of which this room needs to know the size alone."""

    def size(self) -> int:
        """Ranks."""


class Exchange:
    """The ranks that share a row."""

    def __init__(self, group: Group | None = None, rank: int = 0) -> None:
        self.group, self.rank = group, rank
        self.ranks = 1 if group is None else group.size()

    def to_heads(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors (T/R, B, F) -> the same with all tokens of this rank's heads, (T, B, F/R), in one collective."""
        if self.ranks == 1:
            return list(parts)
        shares = [part.unflatten(-1, (self.ranks, -1)) for part in parts]
        sizes = [share.shape[-1] for share in shares]
        sent = torch.cat(shares, -1).permute(2, 0, 1, 3).contiguous()
        received = all_to_all(self.group, sent)  # (R, T/R, B, ...): whose tokens they were
        return list(received.flatten(0, 1).split(sizes, -1))

    def to_tokens(self, part: Tensor) -> Tensor:
        """(T, B, F/R) -> (T/R, B, F)."""
        if self.ranks == 1:
            return part
        received = all_to_all(self.group, part.unflatten(0, (self.ranks, -1)).contiguous())
        return received.permute(1, 2, 0, 3).flatten(2)

    def to_rows(self, part: Tensor) -> Tensor:
        """(T/R, B, D) -> all tokens of this rank's share of the rows, (T, B/R, D)."""
        if self.ranks == 1:
            return part
        shares = part.unflatten(1, (self.ranks, -1)).movedim(1, 0).contiguous()
        return all_to_all(self.group, shares).flatten(0, 1)  # (R, T/R, B/R, D): whose tokens they were

    def mine(self, shared: Tensor) -> Tensor:
        """This rank's share of a tensor whose first axis runs over heads, or over rows: a view."""
        return shared if self.ranks == 1 else shared.chunk(self.ranks)[self.rank]

    def tokens(self, row: Tensor, axis: int) -> Tensor:
        """This rank's share of a tensor with the whole row along `axis`."""
        return row if self.ranks == 1 else row.chunk(self.ranks, axis)[self.rank]

    def last(self, part: Tensor) -> Tensor:
        """What the rank with the row's last tokens holds."""
        return part if self.ranks == 1 else self.everyone(part)[-1]

    def everyone(self, part: Tensor) -> Tensor:
        """What all ranks hold of a tensor, (R, ...): differentiable."""
        if self.ranks == 1:
            return part.unsqueeze(0)
        return gather_from_sequence_parallel_region(part.unsqueeze(0).contiguous(), group=self.group)
