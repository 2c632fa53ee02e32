"""Loss of a linear head without ever holding all logits.

The gradient of a chunk of tokens is taken as soon as its logits exist, so no more than a chunk's logits live at once and the
head is computed once. N tokens, D width, V columns of the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS, TOKENS = 2**24, 512  # held at once at most: enough for large matrix products, and no more
CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def summed_loss(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cross_entropy: CrossEntropy) -> Tensor:
    """Sum over tokens of cross_entropy(x W^T, targets), a scalar of at least float32; once differentiable.

    `cross_entropy` maps logits (n, V) and targets (n,) to token losses (n,) or their sum; it may be a collective over ranks.
    """
    return SummedLoss.apply(x_ND, weight_VD, targets_N, cross_entropy, torch.is_grad_enabled())


def whole_loss(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cross_entropy: CrossEntropy) -> Tensor:
    """The same sum with all logits held at once: differentiable as often as `cross_entropy` is."""
    logits_NV = F.linear(x_ND, weight_VD)
    return cross_entropy(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), targets_N).sum()


class SummedLoss(torch.autograd.Function):
    """Sum of token losses; the gradients are taken chunk by chunk in forward and handed out in backward."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cross_entropy: CrossEntropy, learn: bool
    ) -> Tensor:
        """The sum; gradients of all chunks are kept where they will be asked for."""
        total = torch.zeros((), dtype=torch.promote_types(x_ND.dtype, torch.float32), device=x_ND.device)
        x_grads, weight_grad = [], None
        step = min(TOKENS, max(1, LOGITS // weight_VD.shape[0]))
        for x, targets in zip(x_ND.split(step), targets_N.split(step), strict=True):
            with torch.set_grad_enabled(learn):
                x = x.detach().requires_grad_(learn)
                weight = weight_VD.detach().requires_grad_(learn)
                logits_NV = F.linear(x, weight)
                loss = cross_entropy(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), targets).sum()
            if learn:
                x_grad, part = torch.autograd.grad(loss, (x, weight))
                x_grads.append(x_grad)
                weight_grad = sums(part) if weight_grad is None else weight_grad.add_(part)
            total += loss.detach()
        if weight_grad is not None:
            ctx.save_for_backward(
                x_grads[0] if len(x_grads) == 1 else torch.cat(x_grads), weight_grad.to(weight_VD.dtype)
            )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        """Hands out the kept gradients."""
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad.to(x_grad.dtype), weight_grad * grad.to(weight_grad.dtype), None, None, None


def sums(part: Tensor) -> Tensor:
    """An accumulator that starts as `part`, of at least float32."""
    return part.to(torch.promote_types(part.dtype, torch.float32))
