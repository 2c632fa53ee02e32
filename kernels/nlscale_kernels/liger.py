"""RMSNorm, rotary positions, SwiGLU and cross entropy by liger-kernel (BSD-2), where somebody prefers them on a GPU.

Once differentiable. Each has the signature of the form in torch that it takes the place of.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

ADDED = 0.0  # to a norm's gains


def available() -> bool:
    """Whether liger-kernel is installed."""
    return find_spec("liger_kernel") is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times the gains, over the last axis; the root in float32."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    normed: Tensor = LigerRMSNormFunction.apply(x, weight, eps, ADDED, "llama", False)
    return normed


def rotate_both(q_TBHK: Tensor, k_TBGK: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """As rotary.rotate_both; contiguous queries and keys are written over."""
    from liger_kernel.ops.rope import LigerRopeFunction

    tokens, rows, _, width = q_TBHK.shape
    # One row of all tokens, as it trusts the stride of a token, which is anything where there is one; sines without signs.
    cosine, sine = (x.expand(tokens, rows, 1, width).reshape(1, -1, width) for x in (cosine, sine.roll(width // 2, -1)))
    flat = [x.reshape(1, tokens * rows, *x.shape[2:]).transpose(1, 2) for x in (q_TBHK, k_TBGK)]
    q, k = LigerRopeFunction.apply(*flat, cosine, sine)
    return Guarded.apply(q.transpose(1, 2).view_as(q_TBHK)), Guarded.apply(k.transpose(1, 2).view_as(k_TBGK))


class Guarded(torch.autograd.Function):
    """The same, with a gradient of its own: liger-kernel writes over the one it is given, which others may hold, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, of: Tensor) -> Tensor:  # type: ignore[override]
        """A copy."""
        return of.clone()


def swiglu(fused: Tensor) -> Tensor:
    """As swiglu.swiglu."""
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    product: Tensor = LigerFusedGateUpSiLUMulFunction.apply(fused.reshape(-1, fused.shape[-1]))
    return product.view(*fused.shape[:-1], -1)


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, ignore: int) -> Tensor:
    """Sum of the losses of targets that are not `ignore`; logits are written over with their gradient.

    The sum, and not each token's loss: its gradients with reduction="none" are wrong (liger-kernel, issue 968). The host
    reads four values back.
    """
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    total: Tensor = LigerCrossEntropyFunction.apply(logits_NV, targets_N, None, ignore, 0.0, 0.0, "sum")[0]
    return total
