"""Matrices kept within a norm, with the gradient written out: fewer passes over memory than autograd's own."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def bounded(limit: float, change: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`change` (..., O, I) times min(1, limit / its Frobenius norm), and `beside` times the same; 0: no limit."""
    if not limit:
        return change, beside
    scaled, other = Bounded.apply(change, beside, limit)
    return scaled, other


class Bounded(torch.autograd.Function):
    """Both scaled by what the first one's norm says."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, beside: Tensor | None, limit: float) -> tuple[Tensor, Tensor | None]:
        """The scaled matrices."""
        norm = torch.linalg.vector_norm(change, dim=(-2, -1), keepdim=True)
        share = limit / norm.clamp(min=limit)
        ctx.save_for_backward(change, beside, norm, share)
        ctx.limit = limit
        return change * share, None if beside is None else beside * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of: Tensor, of_beside: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """share (of - change (of . change + of_beside . beside) / norm^2) where the limit holds, share of elsewhere."""
        change, beside, norm, share = ctx.saved_tensors
        along = dot(of, change)
        if beside is not None and of_beside is not None:
            along += dot(of_beside, beside)
        back = torch.where(norm > ctx.limit, -along * share / norm.square(), 0.0)
        first = torch.addcmul(of * share, change, back)
        return first, None if of_beside is None else of_beside * share, None


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums of products (..., 1, 1) over the last two axes."""
    return a.flatten(-2).unsqueeze(-2) @ b.flatten(-2).unsqueeze(-1)
