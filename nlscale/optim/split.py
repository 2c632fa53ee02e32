"""Products of matrices that tensor parallelism may cut: exact, by one all-reduce, or by handing whole matrices around.

K matrices of one shape are computed as a batch; O rows, I columns, this rank's part of them.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Split:
    """How a matrix lies over ranks: whole on each (`axis` None), or cut along its rows (0) or columns (1)."""

    def __init__(self, group: dist.ProcessGroup | None = None, axis: int | None = None) -> None:
        self.ranks = group.size() if group is not None and axis is not None else 1
        self.group, self.axis = group, axis if self.ranks > 1 else None

    def shape(self, x_KOI: Tensor) -> tuple[int, int]:
        """Rows and columns of the whole matrix."""
        o, i = x_KOI.shape[-2:]
        return (o * self.ranks, i) if self.axis == 0 else (o, i * self.ranks) if self.axis == 1 else (o, i)

    def left(self, x_KOI: Tensor, y_KOI: Tensor) -> Tensor:
        """x y^T (K, O, O); the rows must be whole on each rank."""
        return self._sum(x_KOI @ y_KOI.mT, 1)

    def right(self, x_KOI: Tensor, y_KOI: Tensor) -> Tensor:
        """x^T y (K, I, I); the columns must be whole on each rank."""
        return self._sum(x_KOI.mT @ y_KOI, 0)

    def norm(self, x_KOI: Tensor) -> Tensor:
        """Frobenius norms (K, 1, 1)."""
        square = x_KOI.square().sum((-2, -1), keepdim=True)
        return self._sum(square, self.axis).sqrt_()

    def _sum(self, product: Tensor, contracted: int | None) -> Tensor:
        if self.axis is not None and self.axis != contracted:
            raise ValueError(f"axis {self.axis} is cut, but the product contracts axis {contracted}")
        return self.sum(product)

    def sum(self, part: Tensor) -> Tensor:
        """The sum over ranks of what each has, in float32 at least."""
        if self.axis is None:
            return part
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        dist.all_reduce(wide, group=self.group)
        return wide.to(part.dtype)

    def whole(self, function: Callable[..., Sequence[Tensor]], *tensors_KOI: Tensor) -> list[Tensor]:
        """function(*whole tensors), each rank on its share of the K matrices; results are cut as the tensors were."""
        if self.axis is None:
            return list(function(*tensors_KOI))
        count = len(tensors_KOI[0])
        return [self._cut(y, count) for y in function(*map(self._gather, tensors_KOI))]

    def _gather(self, x_KOI: Tensor) -> Tensor:
        """Rank r's share of the batch as whole matrices; the batch is padded to one length a rank."""
        assert self.axis is not None
        share = -(-len(x_KOI) // self.ranks)
        padded = x_KOI.new_zeros((self.ranks * share, *x_KOI.shape[1:]))
        padded[: len(x_KOI)] = x_KOI
        parts = torch.empty_like(padded)
        dist.all_to_all_single(parts, padded, group=self.group)
        return torch.cat(parts.chunk(self.ranks), dim=1 + self.axis)

    def _cut(self, y_KOI: Tensor, count: int) -> Tensor:
        """The way back: every rank's cut of all matrices."""
        assert self.axis is not None
        parts = torch.cat(y_KOI.chunk(self.ranks, dim=1 + self.axis))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received[:count]
