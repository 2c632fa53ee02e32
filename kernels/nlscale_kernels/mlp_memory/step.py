"""The step of memories' weights: decay, momentum and what a chunk wrote, kept within a norm, as an operator.

B rows, H heads, N memories, weights (B, H, N, O, I).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nlscale_kernels import in_turn
from nlscale_kernels.arguments import NARROW, alike, check, check_dtypes, described, on_its_gpu


class Step(NamedTuple):
    """What moves a weight: add = carry speed + sign written, then = left speed + sign held, both times what limits add."""

    state: Tensor  # (B or 1, H, N, O, I)
    speed: Tensor | None  # (B or 1, H, N, O, I); None: no momentum
    written: Tensor  # (B, H, N, O, I): what reaches the state
    held: Tensor | None  # (B, H, N, O, I): what reaches the momentum; None: the same
    keep: Tensor | None  # (B, H): how much of the state is left; None: all
    carry: Tensor | None  # (B, H): how much of the momentum reaches the state
    left: Tensor | None  # (B, H): how much of it is left; None where `held` is
    sign: float = 1.0
    limit: float = 0.0  # largest Frobenius norm of a memory's add; 0: any


class Moved(NamedTuple):
    """Gradients of a step's tensors, in their order; empty for those that are None."""

    state: Tensor
    speed: Tensor
    written: Tensor
    held: Tensor
    keep: Tensor
    carry: Tensor
    left: Tensor


def wide(factor: Tensor) -> Tensor:
    """(B, H) as (B, H, 1, 1, 1)."""
    return factor[..., None, None, None]


def stepped(step: Step) -> tuple[Tensor, Tensor | None]:
    """keep state + add, and the momentum after it."""
    return ended(step, *added(step)[:2])


def added(step: Step) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What is added to the state and, where that differs, what the momentum is then; their share that the limit leaves."""
    add, then = signed(step, step.speed, step.carry, step.written), None
    if step.held is not None:
        then = signed(step, step.speed, step.left, step.held)
    if not step.limit:
        return add, then, None
    share = step.limit / torch.linalg.vector_norm(add, dim=(-2, -1), keepdim=True).clamp(min=step.limit)
    return add * share, None if then is None else then * share, share


def ended(step: Step, add: Tensor, then: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """State and momentum."""
    after = (step.state if step.keep is None else step.state * wide(step.keep)) + add
    return after, None if step.speed is None else add if then is None else then


def signed(step: Step, speed: Tensor | None, factor: Tensor | None, new: Tensor) -> Tensor:
    """factor speed + sign new; on a CPU a product and a difference are faster than one operation with broadcast factors."""
    if speed is None or factor is None:
        return new if step.sign == 1 else step.sign * new
    was = speed * wide(factor)
    return was + new if step.sign == 1 else was - new if step.sign == -1 else was + step.sign * new


@torch.library.custom_op("nlscale::memory_step", mutates_args=())
def forward(
    state: Tensor,
    speed: Tensor | None,
    written: Tensor,
    held: Tensor | None,
    keep_BH: Tensor | None,
    carry_BH: Tensor | None,
    left_BH: Tensor | None,
    sign: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """See `stepped`; no momentum: an empty tensor. Raises ValueError for arguments that do not fit."""
    step = Step(state, speed, written, held, keep_BH, carry_BH, left_BH, sign, limit)
    _check(step)
    after, then = stepped(step)
    return after, written.new_empty(0) if then is None else then.clone()


@torch.library.custom_op("nlscale::memory_step_backward", mutates_args=())
def backward(
    state: Tensor,
    speed: Tensor | None,
    written: Tensor,
    held: Tensor | None,
    keep_BH: Tensor | None,
    carry_BH: Tensor | None,
    left_BH: Tensor | None,
    sign: float,
    limit: float,
    d_after: Tensor,
    d_then: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `gradients`."""
    step = Step(state, speed, written, held, keep_BH, carry_BH, left_BH, sign, limit)
    return Moved._make(x.clone() for x in gradients(step, d_after, d_then))  # an operator's results are no aliases


def gradients(step: Step, d_after: Tensor, d_then: Tensor) -> Moved:
    """From those of the state after the step and of its momentum; nothing but the inputs was kept."""
    nothing, of_then = d_after.new_empty(0), None if step.speed is None else d_then
    d_add, d_then = within(step, d_after, of_then)
    d_state = d_after if step.keep is None else wide(step.keep) * d_after
    d_keep = nothing if step.keep is None else summed(step.state, d_after)
    d_speed = d_carry = d_left = d_held = nothing
    if step.held is None and of_then is not None:
        d_add = d_add + d_then
    if step.speed is not None and step.carry is not None:
        d_speed, d_carry = wide(step.carry) * d_add, summed(step.speed, d_add)
    if step.held is not None and step.speed is not None and step.left is not None:
        d_speed, d_left = torch.addcmul(d_speed, wide(step.left), d_then), summed(step.speed, d_then)
        d_held = step.sign * d_then
    return Moved(d_state, d_speed, d_add if step.sign == 1 else step.sign * d_add, d_held, d_keep, d_carry, d_left)


def within(step: Step, d_after: Tensor, of_then: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of what is added to state and momentum, before the limit; of_then None: there is no momentum."""
    if not step.limit:
        return d_after, d_after if of_then is None else of_then
    add = then = signed(step, step.speed, step.carry, step.written)
    if step.held is not None:
        then = signed(step, step.speed, step.left, step.held)
    square, along = dot(add, add), dot(add, d_after)
    if of_then is not None:
        along = along + dot(then, of_then)
    share = step.limit / square.sqrt().clamp(min=step.limit)
    d_add = torch.addcmul(share * d_after, torch.where(share < 1, -along * share / square, 0), add)
    return d_add, d_after if of_then is None else share * of_then


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums of products (..., 1, 1) over the last two axes."""
    return a.flatten(-2).unsqueeze(-2) @ b.flatten(-2).unsqueeze(-1)


def summed(a: Tensor, b: Tensor) -> Tensor:
    """Products (B, H, N, O, I) summed over what a factor (B, H) multiplies."""
    return (a * b).sum((2, 3, 4))


def _forward_on_gpu(*given: Any) -> tuple[Tensor, Tensor]:
    from nlscale_kernels.mlp_memory import triton

    step = Step(*given)
    _check(step)
    if step.written.dtype in NARROW:
        return triton.stepped(step)
    after, then = stepped(step)
    return after, step.written.new_empty(0) if then is None else then.clone()


def _backward_on_gpu(*given: Any) -> tuple[Tensor, ...]:
    from nlscale_kernels.mlp_memory import triton

    *inputs, d_after, d_then = given
    step = Step(*inputs)
    if step.written.dtype in NARROW:
        return triton.step_gradients(step, d_after, d_then)
    return tuple(x.clone() for x in gradients(step, d_after, d_then))


forward.register_kernel("cuda")(on_its_gpu(_forward_on_gpu))
backward.register_kernel("cuda")(on_its_gpu(_backward_on_gpu))


@forward.register_fake
def _(state: Tensor, speed: Tensor | None, written: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = written.shape
    return written.new_empty(shape), written.new_empty(shape if speed is not None else (0,))


@backward.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    like = given[2]
    return tuple(like.new_empty(0 if x is None else x.shape) for x in given[:7])


def _check(step: Step) -> None:
    shape = step.written.shape
    check(step.written.ndim == 5, f"memory_step: written has shape {tuple(shape)}; it takes (B, H, N, O, I)")
    check_dtypes("memory_step", (*NARROW, torch.float64), written=step.written)
    for name in Moved._fields:
        tensor, wanted = getattr(step, name), shape[:2] if name in ("keep", "carry", "left") else shape
        check(
            tensor is None or alike(tensor, wanted, step.written),
            f"memory_step: {name} is {described(tensor)}; it must be {step.written.dtype} {tuple(wanted)} on "
            f"{step.written.device}",
        )
    momentum = step.speed is not None
    check((step.carry is not None) == momentum, "memory_step: speed and carry go together")
    check((step.held is None) == (step.left is None), "memory_step: held and left go together")
    check(step.held is None or momentum, "memory_step: held needs speed")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.sign, ctx.limit = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_after: Tensor, d_then: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    step = Step._make((*tensors, ctx.sign, ctx.limit))
    found: Any = gradients(step, d_after, d_then) if in_turn.asked() else backward(*step, d_after, d_then)
    return (*(None if x is None else d for x, d in zip(tensors, found, strict=True)), None, None)


forward.register_autograd(_backward, setup_context=_save)


class Plainly(torch.autograd.Function):
    """`stepped` without an operator's dispatch; it keeps states and momenta, as others do, and not what was written."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `stepped`; and the share that the limit leaves, so that backward can be differentiated in turn."""
        step = Step._make(given)
        add, then, share = added(step)
        after, then = ended(step, add, then)
        ctx.same, ctx.sign, ctx.limit = step.held is None and step.speed is not None, step.sign, step.limit
        apart = bool(step.limit) and not ctx.same  # what was added is the difference of states
        state = step.state if apart or step.keep is not None else None
        ends = after if apart else None, then if step.limit else None, share
        ctx.save_for_backward(state, step.speed, step.keep, step.carry, step.left, *ends)
        return after, then, share

    @staticmethod
    def backward(ctx: Any, d_after: Tensor, d_then: Tensor, d_share: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """See `gradients`; with share s = limit / |add| below 1, d_add = s (d - a (a . d + s d_share) / limit^2), a = s add.

        Where a is the difference of states, it has their rounding: float32 gradients along a are off by about 1e-7
        |state| / limit.
        """
        state, speed, keep, carry, left, after, then, share = ctx.saved_tensors
        d_state = d_after if keep is None else wide(keep) * d_after
        d_keep = None if keep is None else summed(state, d_after)
        d_add = d_after + d_then if ctx.same else d_after
        if share is not None:
            added = then if ctx.same else after - (state if keep is None else wide(keep) * state)
            along = dot(added, d_add)
            if left is not None:
                along, d_then = along + dot(then, d_then), share * d_then
            along = torch.addcmul(along, share, d_share)
            d_add = torch.addcmul(d_add, torch.where(share < 1, along / -(ctx.limit**2), 0), added) * share
        d_speed = d_held = d_carry = d_left = None
        if speed is not None:
            d_speed, d_carry = wide(carry) * d_add, summed(speed, d_add)
            if left is not None:
                d_speed, d_left = torch.addcmul(d_speed, wide(left), d_then), summed(speed, d_then)
                d_held = d_then if ctx.sign == 1 else ctx.sign * d_then
        d_written = d_add if ctx.sign == 1 else ctx.sign * d_add
        return d_state, d_speed, d_written, d_held, d_keep, d_carry, d_left, None, None


def moved(step: Step) -> tuple[Tensor, Tensor | None]:
    """State and momentum after a step: the operator on a GPU; on a CPU `Plainly`, which torch.compile can fuse."""
    state, speed = (None if x is None else x.expand_as(step.written) for x in step[:2])
    if step.written.is_cpu:
        after, then, _ = Plainly.apply(state, speed, *step[2:])
        return after, then
    after, then = forward(state, speed, *step[2:])
    return after, None if speed is None else then
