"""The memories' three functions with gradients written out: they keep W2's products alone; glue.py lies between products.

Names are those of reference.py; d... is the gradient of the loss with respect to .... A gradient that is differentiated in
turn is that of reference.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nlscale_kernels import in_turn
from nlscale_kernels.mlp_memory import reference
from nlscale_kernels.mlp_memory.op import glue_for
from nlscale_kernels.mlp_memory.reference import Net


def read(net: Net, z: Tensor, activation: str = "silu") -> Tensor:
    """What the memories say to z (B, H, C, K): (B, H, N, C, O)."""
    said: Tensor = Read.apply(z, net.up, net.down, net.adds, activation)
    return said


def gathered(
    net: Net, key: Tensor, target: Tensor, arrives: Tensor, weights: Sequence[Tensor], activation: str = "silu"
) -> tuple[Tensor, list[Tensor]]:
    """Sums over the tokens of a chunk (reference.py has the shapes)."""
    given = (key, target, arrives, torch.stack(list(weights), -1), *net, net.adds, activation)
    first, second = Gathered.apply(*given)
    return first, list(second.split(net.down.shape[-2], -2))


def self_taught(
    net: Net,
    key: Tensor,
    value: Tensor,
    reach: Tensor,
    share: Tensor,
    weights: Sequence[Tensor],
    activation: str = "silu",
) -> tuple[Tensor, list[Tensor]]:
    """gathered with the memories' own answers to values (B, H, C, K) as targets, and share (B, H, C) times reach arriving:
    gathered(net, key, read(net, value), share reach, weights).
    """
    given = (key, value, reach, share.unsqueeze(-1), torch.stack(list(weights), -1), *net, net.adds, activation)
    first, second = SelfTaught.apply(*given)
    return first, list(second.split(net.down.shape[-2], -2))


class Read(torch.autograd.Function):
    """read, keeping W2 z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, up: Tensor, down: Tensor, adds: bool, activation: str) -> Tensor:
        """(B, H, N, C, O)."""
        glue = glue_for(z, activation)
        before = z.unsqueeze(2) @ up.mT
        said = glue.active(before) @ down.mT
        ctx.save_for_backward(z, up, down, before)
        ctx.adds, ctx.activation = adds, activation
        return in_turn.anew(said.add_(z.unsqueeze(2))) if adds else said

    @staticmethod
    def backward(ctx: Any, of: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of z, W2 and W1."""
        z, up, down, before = ctx.saved_tensors
        if in_turn.asked():

            def said(z: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor]:
                return (reference.read(Net(up, down), z, ctx.activation),)

            return *in_turn.gradients(said, (z, up, down), (of,)), None, None
        glue = glue_for(z, ctx.activation)
        d_down = summed(of.mT @ glue.active(before), down.shape)
        d_before = glue.returned(before, of @ down)
        d_up = summed(d_before.mT @ z.unsqueeze(2), up.shape)
        d_z = (d_before @ up).add_(of) if ctx.adds else d_before @ up
        return over_memories(d_z), d_up, d_down, None, None


class Gathered(torch.autograd.Function):
    """gathered, keeping W2 k and the errors; weights (B, H, C, W), sums for them one below the other."""

    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        target: Tensor,
        arrives: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        adds: bool,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        """(B, H, N, I, A) and (B, H, N, W O, M)."""
        glue = glue_for(key, activation)
        before = key.unsqueeze(2) @ up.mT
        active, rise = glue.rise(before)
        error, weighed = glue.errors(active @ down.mT, target, key if adds else None, weights)
        back = glue.pulled(rise, error @ down)
        ctx.save_for_backward(key, target, arrives, weights, up, down, before, error)
        ctx.adds, ctx.activation = adds, activation
        return back.mT @ arrives.unsqueeze(2), weighed.mT @ active

    @staticmethod
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of all tensors."""
        key, target, arrives, weights, up, down, before, error = ctx.saved_tensors
        if in_turn.asked():

            def sums(*given: Tensor) -> tuple[Tensor, Tensor]:
                key, target, arrives, weights, up, down = given
                each = weights.unbind(-1)
                return one_below(reference.gathered(Net(up, down), key, target, arrives, each, ctx.activation))

            given = key, target, arrives, weights, up, down
            return *in_turn.gradients(sums, given, (d_first, d_second)), None, None
        glue = glue_for(key, ctx.activation)
        active, pulled, pushed, bent, kept = glue.second(before, error @ down, arrives.unsqueeze(2) @ d_first.mT)
        d_arrives = over_memories(pulled @ d_first)
        d_weights, d_error, weighed = glue.of_errors(active @ d_second.mT, error, weights, pushed @ down.mT)
        d_down = summed(plus(error.mT @ pushed, d_error.mT, active), down.shape)
        d_before = glue.last(kept, plus(d_error @ down, weighed, d_second), bent)
        d_up = summed(d_before.mT @ key.unsqueeze(2), up.shape)
        d_key = d_before @ up
        d_key = over_memories(d_key.add_(d_error) if ctx.adds else d_key)
        return d_key, summed(d_error.neg_(), target.shape), d_arrives, d_weights, d_up, d_down, None, None


class SelfTaught(torch.autograd.Function):
    """self_taught, keeping W2 k, W2 v and the errors, which are M(k) - M(v): W1 is multiplied once, by the difference."""

    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        value: Tensor,
        reach: Tensor,
        share: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        adds: bool,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        """(B, H, N, I, A) and (B, H, N, W O, M)."""
        glue = glue_for(key, activation)
        before, goal = key.unsqueeze(2) @ up.mT, value.unsqueeze(2) @ up.mT
        active, rise = glue.rise(before)
        heard = (active - glue.active(goal)) @ down.mT
        beyond = value - key if adds else heard.new_zeros(()).expand(*key.shape[:-1], heard.shape[-1])
        error, weighed = glue.errors(heard, beyond.unsqueeze(2), None, weights)
        back = glue.pulled(rise, error @ down)
        ctx.save_for_backward(key, value, reach, share, weights, up, down, before, goal, error)
        ctx.adds, ctx.activation = adds, activation
        return back.mT @ (share * reach).unsqueeze(2), weighed.mT @ active

    @staticmethod
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of all tensors."""
        key, value, reach, share, weights, up, down, before, goal, error = ctx.saved_tensors
        if in_turn.asked():

            def sums(*given: Tensor) -> tuple[Tensor, Tensor]:
                key, value, reach, share, weights, up, down = given
                net, each = Net(up, down), weights.unbind(-1)
                one = share.squeeze(-1)
                return one_below(reference.self_taught(net, key, value, reach, one, each, ctx.activation))

            given = key, value, reach, share, weights, up, down
            return *in_turn.gradients(sums, given, (d_first, d_second)), None, None
        glue = glue_for(key, ctx.activation)
        active, pulled, pushed, bent, kept = glue.second(
            before, error @ down, (share * reach).unsqueeze(2) @ d_first.mT
        )
        d_arrives = over_memories(pulled @ d_first)
        d_share = (d_arrives * reach).sum(-1, keepdim=True)
        d_weights, d_error, weighed = glue.of_errors(active @ d_second.mT, error, weights, pushed @ down.mT)
        d_down = summed(plus(error.mT @ pushed, d_error.mT, active.sub_(glue.active(goal))), down.shape)
        through = d_error @ down  # what s(W2 k) hears of the errors, and s(W2 v) with the other sign
        d_goal = glue.returned(goal, through)
        d_before = glue.last(kept, plus(through, weighed, d_second), bent)
        d_up = summed(plus(d_before.mT @ key.unsqueeze(2), d_goal.mT, value.unsqueeze(2), -1), up.shape)
        if ctx.adds:
            d_value, d_key = (d_goal @ up).add_(d_error), plus(d_error, d_before, up)
        else:
            d_value, d_key = d_goal @ up, d_before @ up
        of_tokens = over_memories(d_key), over_memories(d_value).neg_(), d_arrives * share, d_share, d_weights
        return *of_tokens, d_up, d_down, None, None


def one_below(found: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, Tensor]:
    """What reference.py gives, as the functions above do."""
    first, second = found
    return first, torch.cat(second, -2)


def plus(total: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """total + sign a b, over total, which lies in one piece: one pass over it fewer than a product and a sum."""
    count = total.shape[:-2]
    first, second = (x.expand(*count, *x.shape[-2:]).flatten(0, -3) for x in (a, b))
    flat = total.view(-1, *total.shape[-2:])
    if torch.compiler.is_compiling():  # which would copy back what is written over
        return torch.baddbmm(flat, first, second, alpha=sign).view_as(total)
    torch.baddbmm(flat, first, second, alpha=sign, out=flat)
    return total


def over_memories(gradient: Tensor) -> Tensor:
    """The sum (B, H, C, K) over a head's memories (B, H, N, C, K); of one there is nothing to copy."""
    return gradient.squeeze(2) if gradient.shape[2] == 1 else gradient.sum(2)


def summed(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient summed over what was broadcast: rows of a memory that all share, memories of one target."""
    axes = [axis for axis, size in enumerate(shape) if size == 1 and gradient.shape[axis] != 1]
    return gradient.sum(axes, keepdim=True) if axes else gradient
