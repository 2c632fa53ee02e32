"""What lies between the matrix products of a memory, in torch; activations s of W2 z and the Jacobian J of s.

`before` (..., I) is W2 z: I = M units, or for SwiGLU 2 M, gates and units side by side. Tensors that the caller no longer
needs are written over where the docstring says so.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Second(NamedTuple):
    """What backward needs of the activation at one place."""

    active: Tensor  # s(before) (..., M)
    pulled: Tensor  # J^T inward (..., I)
    pushed: Tensor  # J d_back (..., M)
    bent: Tensor  # gradient of d_back . (J^T inward) with respect to before (..., I)
    kept: Tensor  # what `last` wants of before


class Activation(Protocol):
    """One kind of unit."""

    def active(self, before: Tensor) -> Tensor:
        """s(before)."""

    def returned(self, before: Tensor, inward: Tensor) -> Tensor:
        """J^T inward."""

    def rise(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """s(before), and what `pulled` wants of it."""

    def pulled(self, rise: Tensor, inward: Tensor) -> Tensor:
        """J^T inward, written over inward where it has its size."""

    def second(self, before: Tensor, inward: Tensor, d_back: Tensor) -> Second:
        """See Second; d_back is written over."""

    def last(self, kept: Tensor, d_active: Tensor, bent: Tensor) -> Tensor:
        """J^T d_active + bent, written over bent."""


class Silu:
    """s(h) = h g, g the sigmoid of h."""

    def active(self, before: Tensor) -> Tensor:
        """See Activation."""
        return F.silu(before)

    def returned(self, before: Tensor, inward: Tensor) -> Tensor:
        """See Activation."""
        gradient: Tensor = torch.ops.aten.silu_backward(inward, before)
        return gradient

    def rise(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """s'(h) = g + s (1 - g), which lies between s and 1."""
        gate = torch.sigmoid(before)
        active = before * gate
        return active, torch.lerp(active, gate.new_ones(()), gate)

    def curve(self, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, s' and s''(h) = (1 - g) (2 s' - s)."""
        gate = torch.sigmoid(before)
        active = before * gate
        rise = torch.lerp(active, gate.new_ones(()), gate)
        bend = torch.lerp(active, rise, 2.0)
        return active, rise, bend.addcmul_(bend, gate, value=-1)

    def pulled(self, rise: Tensor, inward: Tensor) -> Tensor:
        """See Activation."""
        return inward.mul_(rise)

    def second(self, before: Tensor, inward: Tensor, d_back: Tensor) -> Second:
        """See Activation."""
        active, rise, bend = self.curve(before)
        pulled, pushed = inward * rise, d_back * rise
        return Second(active, pulled, pushed, d_back.mul_(inward).mul_(bend), rise)

    def last(self, kept: Tensor, d_active: Tensor, bent: Tensor) -> Tensor:
        """See Activation."""
        return bent.addcmul_(kept, d_active)


class Gelu(Silu):
    """s(h) = h P(h), P the normal distribution's function and p its density."""

    def active(self, before: Tensor) -> Tensor:
        """See Activation."""
        return F.gelu(before)

    def returned(self, before: Tensor, inward: Tensor) -> Tensor:
        """See Activation."""
        gradient: Tensor = torch.ops.aten.gelu_backward(inward, before)
        return gradient

    def rise(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """s'(h) = P + h p."""
        below = torch.erf(before / sqrt(2)).add_(1).mul_(0.5)
        return before * below, below.addcmul_(before, density(before))

    def curve(self, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, s' and s''(h) = p (2 - h^2)."""
        return *self.rise(before), density(before).mul_(2 - before.square())


class Swiglu:
    """s(g, h) = silu(g) h."""

    def __init__(self, gate: Silu) -> None:
        self.gate = gate

    def active(self, before: Tensor) -> Tensor:
        """See Activation."""
        gate, up = before.chunk(2, -1)
        return self.gate.active(gate) * up

    def returned(self, before: Tensor, inward: Tensor) -> Tensor:
        """See Activation."""
        return self.pulled(self.rise(before)[1], inward)

    def rise(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """The Jacobian (s'(g) h, s(g)), side by side."""
        gate, up = before.chunk(2, -1)
        value, rise = self.gate.rise(gate)
        return value * up, torch.cat([rise * up, value], -1)

    def pulled(self, rise: Tensor, inward: Tensor) -> Tensor:
        """See Activation."""
        return rise * torch.cat([inward, inward], -1)

    def second(self, before: Tensor, inward: Tensor, d_back: Tensor) -> Second:
        """See Activation."""
        (gate, up), (d_gate, d_up) = before.chunk(2, -1), d_back.chunk(2, -1)
        value, rise, bend = self.gate.curve(gate)
        active, jacobian = value * up, torch.cat([rise * up, value], -1)
        pushed = (jacobian * d_back).unflatten(-1, (2, -1)).sum(-2)
        of_gate = (bend * up * d_gate + rise * d_up) * inward
        bent = torch.cat([of_gate, rise * d_gate * inward], -1)
        return Second(active, self.pulled(jacobian, inward), pushed, bent, jacobian)

    def last(self, kept: Tensor, d_active: Tensor, bent: Tensor) -> Tensor:
        """See Activation."""
        return bent.addcmul_(kept, torch.cat([d_active, d_active], -1))


def density(h: Tensor) -> Tensor:
    """Of the normal distribution."""
    return (-0.5 * h.square()).exp_().div_(sqrt(2 * pi))


ACTIVATIONS: dict[str, Activation] = {"silu": Silu(), "gelu": Gelu(), "swiglu": Swiglu(Silu())}


def errors(heard: Tensor, target: Tensor, key: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    """heard - target, + key: errors (B, H, N, C, O), over heard; and these times each weight, side by side (..., W O).

    Targets (B, H, N or 1, C, O), weights (B, H, C, W), keys (B, H, C, O) where memories add them.
    """
    error = heard.sub_(target)
    error = error if key is None else error.add_(key.unsqueeze(2))
    return error, weighed(error, weights)


def weighed(error: Tensor, weights: Tensor) -> Tensor:
    """Errors (B, H, N, C, O) times each of W weights, side by side: (B, H, N, C, W O)."""
    return (error.unsqueeze(-2) * weights.unsqueeze(2).unsqueeze(-1)).flatten(-2)


def of_errors(heard: Tensor, error: Tensor, weights: Tensor, through: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients of weighed errors, `heard` (B, H, N, C, W O): those of weights (B, H, C, W), d_error, weighed errors.

    d_error = heard . weights + through, over `through`.
    """
    heard = heard.unflatten(-1, (weights.shape[-1], -1))
    d_weights = (heard * error.unsqueeze(-2)).sum((2, -1))
    d_error = through.add_((heard * weights.unsqueeze(2).unsqueeze(-1)).sum(-2))
    return d_weights, d_error, weighed(error, weights)


class Glue(NamedTuple):
    """All of it for one activation: in torch, or as operators."""

    active: Callable[[Tensor], Tensor]
    returned: Callable[[Tensor, Tensor], Tensor]
    rise: Callable[[Tensor], tuple[Tensor, Tensor]]
    pulled: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor, Tensor, Tensor], Second]
    last: Callable[[Tensor, Tensor, Tensor], Tensor]
    errors: Callable[[Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]] = errors
    of_errors: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = of_errors


TORCH = {
    name: Glue(kind.active, kind.returned, kind.rise, kind.pulled, kind.second, kind.last)
    for name, kind in ACTIVATIONS.items()
}
