"""Vectors scaled to one length, with the gradient written out: fewer passes over memory than torch's own."""

from typing import Any

import torch
from torch import Tensor


def unit(x: Tensor, length: float = 1.0, eps: float = 1e-12) -> Tensor:
    """length x / sqrt(|x|^2 + eps) along the last axis (K); RMS norm for length = sqrt(K), eps = K times its own.

    Differentiable as often as one likes.
    """
    return Unit.apply(x, length, eps)


class Unit(torch.autograd.Function):
    """x over its length."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: float, eps: float) -> Tensor:
        """The scaled vectors; they and the scales are kept."""
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(eps).rsqrt_().mul_(length)
        y = x * scale
        ctx.save_for_backward(x, y, scale)
        ctx.length, ctx.eps = length, eps
        return y

    @staticmethod
    def backward(ctx: Any, of: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """(of - y (of . y) / length^2) scale."""
        x, y, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this in turn
            scale = ctx.length * (x.square().sum(-1, keepdim=True) + ctx.eps).rsqrt()
        along = (of * y).sum(-1, keepdim=True) / ctx.length**2
        return torch.addcmul(of, y, along, value=-1) * scale, None, None
