"""The memories' two functions with gradients written out: they keep W2's products alone and add in place.

Names are those of reference.py; d... is the gradient of the loss with respect to ...; once differentiable.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale_kernels.mlp_memory.reference import Net


def read(net: Net, z: Tensor) -> Tensor:
    """What the memories say to z (B, H, C, K): (B, H, N, C, O)."""
    return Read.apply(z, net.up, net.down, net.adds)


def gathered(
    net: Net, key: Tensor, target: Tensor, arrives: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Sums over the tokens of a chunk (reference.py has the shapes)."""
    first, second = Gathered.apply(key, target, arrives, torch.stack(list(weights), -1), net.up, net.down, net.adds)
    return first, list(second.split(net.down.shape[-2], -2))


class Read(torch.autograd.Function):
    """read, keeping W2 z and its activation."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, up: Tensor, down: Tensor, adds: bool) -> Tensor:
        """(B, H, N, C, O)."""
        before = z.unsqueeze(2) @ up.mT
        active = F.silu(before)
        said = active @ down.mT
        ctx.save_for_backward(z, up, down, before, active)
        ctx.adds = adds
        return said.add_(z.unsqueeze(2)) if adds else said

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        """Gradients of z, W2 and W1."""
        z, up, down, before, active = ctx.saved_tensors
        d_down = summed(of.mT @ active, down.shape)
        d_before = torch.ops.aten.silu_backward(of @ down, before)
        d_up = summed(d_before.mT @ z.unsqueeze(2), up.shape)
        d_z = (d_before @ up).add_(of) if ctx.adds else d_before @ up
        return over_memories(d_z), d_up, d_down, None


class Gathered(torch.autograd.Function):
    """gathered, keeping W2 k and the errors; weights (B, H, C, W), sums for them one below the other."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, target: Tensor, arrives: Tensor, weights: Tensor, up: Tensor, down: Tensor, adds: bool
    ) -> tuple[Tensor, Tensor]:
        """(B, H, N, M, A) and (B, H, N, W O, M)."""
        before = key.unsqueeze(2) @ up.mT
        active, rise = rising(before)
        error = (active @ down.mT).sub_(target)
        error = error.add_(key.unsqueeze(2)) if adds else error
        back = (error @ down).mul_(rise)
        ctx.save_for_backward(key, target, arrives, weights, up, down, before, error)
        ctx.adds = adds
        return back.mT @ arrives.unsqueeze(2), weighed(error, weights).mT @ active

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of all tensors."""
        key, target, arrives, weights, up, down, before, error = ctx.saved_tensors
        active, rise = rising(before)
        inward = error @ down
        d_back = arrives.unsqueeze(2) @ d_first.mT
        d_arrives = over_memories((inward * rise) @ d_first)
        d_inward = d_back * rise
        heard = (active @ d_second.mT).unflatten(-1, (weights.shape[-1], -1))  # (B, H, N, C, W, O)
        d_weights = (heard * error.unsqueeze(-2)).sum((2, -1))
        d_error = (heard * weights.unsqueeze(2).unsqueeze(-1)).sum(-2).add_(d_inward @ down.mT)
        spread = torch.cat([weighed(error, weights), d_error], -1)
        d_active = spread @ torch.cat([d_second, down.expand(*d_second.shape[:3], *down.shape[3:])], -2)
        d_down = summed(error.mT @ d_inward + d_error.mT @ active, down.shape)
        d_before = d_active.mul_(rise).addcmul_(d_back.mul_(inward), bending(before, active))
        d_up = summed(d_before.mT @ key.unsqueeze(2), up.shape)
        d_key = d_before @ up
        d_key = over_memories(d_key.add_(d_error) if ctx.adds else d_key)
        return d_key, summed(d_error.neg_(), target.shape), d_arrives, d_weights, d_up, d_down, None


def rising(before: Tensor) -> tuple[Tensor, Tensor]:
    """s(h) = h g and s'(h) = g + s (1 - g), g the sigmoid of h."""
    gate = torch.sigmoid(before)
    active = before * gate
    return active, torch.addcmul(active, active, gate, value=-1).add_(gate)


def bending(before: Tensor, active: Tensor) -> Tensor:
    """s''(h) = g (1 - g) (2 + h - 2 s)."""
    gate = torch.sigmoid(before)
    rest = torch.sub(before, active, alpha=2).add_(2)
    return torch.addcmul(gate, gate, gate, value=-1).mul_(rest)


def weighed(error: Tensor, weights: Tensor) -> Tensor:
    """Errors (B, H, N, C, O) times each of W weights, side by side: (B, H, N, C, W O)."""
    return (error.unsqueeze(-2) * weights.unsqueeze(2).unsqueeze(-1)).flatten(-2)


def over_memories(gradient: Tensor) -> Tensor:
    """The sum (B, H, C, K) over a head's memories (B, H, N, C, K); of one there is nothing to copy."""
    return gradient.squeeze(2) if gradient.shape[2] == 1 else gradient.sum(2)


def summed(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient summed over what was broadcast: rows of a memory that all share, memories of one target."""
    axes = [axis for axis, size in enumerate(shape) if size == 1 and gradient.shape[axis] != 1]
    return gradient.sum(axes, keepdim=True) if axes else gradient
