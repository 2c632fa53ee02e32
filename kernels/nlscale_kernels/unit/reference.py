"""Vectors scaled to one length, with the gradient written out: fewer passes over memory than torch's own."""

from typing import Any

import torch
from torch import Tensor

from nlscale_kernels import in_turn


def unit(x: Tensor, length: float = 1.0, eps: float = 1e-12) -> Tensor:
    """length x / sqrt(|x|^2 + eps) along the last axis (K); RMS norm for length = sqrt(K), eps = K times its own.

    Differentiable as often as one likes.
    """
    y: Tensor = Unit.apply(x, length, eps)[0]
    return y


class Unit(torch.autograd.Function):
    """x over its length, and what it was multiplied by; these two alone are kept, so that backward needs no x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: float, eps: float) -> tuple[Tensor, Tensor]:
        """The scaled vectors, and their scales (..., 1)."""
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(eps).rsqrt_().mul_(length)
        y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.length = length
        ctx.set_materialize_grads(False)
        return y, in_turn.anew(scale)

    @staticmethod
    def backward(ctx: Any, of: Tensor | None, of_scale: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        """scale (of - y (of . y + of_scale scale) / length^2): the scale's own gradient is -scale^2 y / length^2."""
        y, scale = ctx.saved_tensors
        if of is None and of_scale is None:
            return None, None, None
        along = scale.new_zeros(()) if of is None else (of * y).sum(-1, keepdim=True)
        along = along if of_scale is None else along + of_scale * scale
        along = along / ctx.length**2
        back = -y * along if of is None else torch.addcmul(of, y, along, value=-1)
        return back * scale, None, None
