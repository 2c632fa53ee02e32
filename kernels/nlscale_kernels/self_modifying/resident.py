"""The main memory's walk as an operator: on a GPU its weights stay on chip from chunk to chunk; else `walk.walk`.

B rows, H heads, T tokens, N chunks that write (the first ones), C tokens of a chunk, K head width, M units.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale_kernels import in_turn
from nlscale_kernels.arguments import on_its_gpu
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.self_modifying import walk as by_chunks
from nlscale_kernels.self_modifying.given import (
    DIFFERENTIABLE,
    ROOM,
    WIDEST,
    Given,
    Walked,
    check_given,
    check_on_gpu,
)
from nlscale_kernels.self_modifying.parts import Kind, Made, Moving, Tokens
from nlscale_kernels.self_modifying.writes import Scalars, Writes
from nlscale_kernels.turned import doubtful

KERNELS = ("resident.walk", "resident.gradients")  # as tuned files call them


def looped(given: Given) -> tuple[Tensor, ...]:
    """Walked, without what is kept and without a momentum that there is not."""
    nothing, chunk = torch.zeros_like(given.write), given.chunk
    tokens = Tokens(given.q, given.q, None, given.fresh)
    said = Made(given.k, given.v, given.rate, given.rate)
    hold = nothing if given.hold is None else given.hold
    writes = []
    for c in range(given.turn.shape[2]):
        span = slice(c * chunk, (c + 1) * chunk)
        whole, carried, carry, left = given.factors[:, :, c].unbind(-1)
        scalars = Scalars(whole, given.write[:, :, span], carry, left, hold[:, :, span])
        momentum, fresh = None if given.hold is None else carried, None if given.fresh is None else given.fresh[:, span]
        writes.append(Writes(given.turn[:, :, c], given.reach[:, :, span], scalars, momentum, 0.0, fresh))
    speed = None
    if given.up_speed is not None and given.down_speed is not None:
        speed = Net(given.up_speed.unsqueeze(2), given.down_speed.unsqueeze(2))
    main, first = (
        Net(given.up.unsqueeze(2), given.down.unsqueeze(2)),
        Net(given.first_up[None, :, None], given.first_down[None, :, None]),
    )
    out, (net, then) = by_chunks.walk(tokens, said, writes, (main, speed), first, Kind(given.clip), chunk)
    return (out, *(part.squeeze(2) for part in (*net, *(then or ()))))


def kept_by(given: Given) -> int:
    """Numbers that the kernels keep: weights and momenta before every chunk and after the last, two shares a chunk."""
    (*heads, count, _, _), (units, width) = given.turn.shape, given.up.shape[2:]
    states = (count + 1) * units * width * (2 if given.hold is None else 4)
    return heads[0] * heads[1] * (states + 2 * count)


@torch.library.custom_op("nlscale::resident", mutates_args=())
def resident(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    reach: Tensor,
    write: Tensor,
    hold: Tensor | None,
    turn: Tensor,
    factors: Tensor,
    fresh: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_speed: Tensor | None,
    down_speed: Tensor | None,
    first_up: Tensor,
    first_down: Tensor,
    chunk: int,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See Walked. Raises ValueError for arguments that do not fit."""
    tokens, weights = (q, k, v, rate, reach, write, hold, turn, factors, fresh), (up, down, up_speed, down_speed)
    given = Given._make((*tokens, *weights, first_up, first_down, chunk, clip))
    check_given(given)
    said, *state = looped(given)
    none = [q.new_empty(0)] * (4 - len(state))
    up, down, up_speed, down_speed = (x.clone() for x in (*state, *none))
    return Walked(said, up, down, up_speed, down_speed, q.new_empty(0))


@torch.library.custom_op("nlscale::resident_backward", mutates_args=(), device_types="cuda")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    reach: Tensor,
    write: Tensor,
    hold: Tensor | None,
    turn: Tensor,
    factors: Tensor,
    fresh: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_speed: Tensor | None,
    down_speed: Tensor | None,
    first_up: Tensor,
    first_down: Tensor,
    chunk: int,
    clip: float,
    kept: Tensor,
    of: list[Tensor],
) -> list[Tensor]:
    """Gradients of DIFFERENTIABLE from those of said, up, down and, with momentum, its two; empty for what is None."""
    from nlscale_kernels.self_modifying import triton_backward

    tokens, weights = (q, k, v, rate, reach, write, hold, turn, factors, fresh), (up, down, up_speed, down_speed)
    given = Given._make((*tokens, *weights, first_up, first_down, chunk, clip))
    with torch.cuda.device_of(q):
        return triton_backward.gradients(given, kept, of)


def gradients(given: Given, of: Sequence[Tensor]) -> list[Tensor]:
    """As `backward`, by autograd over the walk done again."""
    known = {name: getattr(given, name) for name in DIFFERENTIABLE}
    with torch.enable_grad():
        leaves: dict[str, Any] = {name: x if x is None else x.detach().requires_grad_() for name, x in known.items()}
        wanted = [x for x in leaves.values() if x is not None]
        found = iter(torch.autograd.grad(looped(given._replace(**leaves)), wanted, list(of), allow_unused=True))
    each = (given.q.new_empty(0) if x is None else next(found) for x in leaves.values())
    return [torch.zeros_like(x) if d is None else d for x, d in zip(known.values(), each, strict=True)]


def _forward_on_gpu(*arguments: Any) -> Walked:
    from nlscale_kernels.self_modifying import triton_backward

    given = Given(*arguments)
    check_given(given)
    check_on_gpu(given.q, given.up)
    return triton_backward.walked(given)


resident.register_kernel("cuda")(on_its_gpu(_forward_on_gpu))


@resident.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    given = Given(*arguments)
    speeds = [given.q.new_empty(0 if x is None else x.shape) for x in given[12:14]]
    states = [x.new_empty(x.shape) for x in (given.q, given.up, given.down)]
    return (*states, *speeds, given.q.new_empty(0 if given.q.is_cpu else kept_by(given)))


@backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    given = Given(*arguments[:-2])
    known = [getattr(given, name) for name in DIFFERENTIABLE]
    return [given.q.new_empty(0 if x is None else x.shape) for x in known]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.chunk, ctx.clip = inputs
    ctx.save_for_backward(*tensors, output[-1])
    ctx.set_materialize_grads(False)  # of `kept` it would be as large as all states


def _backward(ctx: Any, *of: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    given = Given._make((*tensors, ctx.chunk, ctx.clip))
    if in_turn.asked():
        ends = of[: 3 if given.hold is None else 5]  # `kept` has no gradient
        return (*in_turn.gradients(lambda *each: looped(Given._make(each)), given, ends),)
    like = [x for x in (given.q, *given[10:14]) if x is not None]
    wanted = [torch.zeros_like(x) if d is None else d for x, d in zip(like, of, strict=False)]
    found = backward(*given, kept, wanted) if kept.numel() else gradients(given, wanted)
    each = dict(zip(DIFFERENTIABLE, found, strict=True))
    return tuple(each[name] if name in each and getattr(given, name) is not None else None for name in Given._fields)


resident.register_autograd(_backward, setup_context=_save)


def able(index: int) -> bool:
    """Whether this GPU has room, and Triton's code for it is trusted.

    Where Triton is known to compile transposed sums wrongly in some shapes (turned.py), it is once `tune` has held the
    kernels against float64 on such a device, and named configs that are right.
    """
    import triton

    from nlscale_kernels.tuned import device_facts, entries, file_of

    name, arch = device_facts(index)
    known = not doubtful(triton.__version__, arch // 10) or entries(file_of(name)).keys() >= set(KERNELS)
    return arch // 10 in ROOM and known


able._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result imports the compiler


def fits(q: Tensor, net: Net, count: int) -> bool:
    """Whether there is a kernel: float32 on a GPU that is able to (which the meta device stands for), small matrices."""
    if q.is_cpu or q.dtype != torch.float32 or not count or "cuda" in resident._disabled_kernel:
        return False
    return (q.is_meta or able(q.device.index or 0)) and max(net.up.shape[-2:]) <= WIDEST


def walk(
    tokens: Tokens, said: Made, all_writes: Sequence[Writes], main: Moving, initial: Net, kind: Kind, chunk: int
) -> tuple[Tensor, Moving]:
    """As walk.walk: the operator where it has a kernel."""
    net, speed = main
    if kind.activation != "silu" or kind.per_layer or not fits(tokens.q, net, len(all_writes)):
        return by_chunks.walk(tokens, said, all_writes, main, initial, kind, chunk)
    given = flat(tokens, said, all_writes, main, initial, kind.clip, chunk)
    o, up, down, up_speed, down_speed, _ = resident(*given)
    after = None if speed is None else Net(up_speed.unsqueeze(2), down_speed.unsqueeze(2))
    return o, (Net(up.unsqueeze(2), down.unsqueeze(2)), after)


def flat(
    tokens: Tokens, said: Made, all_writes: Sequence[Writes], main: Moving, initial: Net, clip: float, chunk: int
) -> Given:
    """The walk's arguments as the operator takes them."""
    rows, (net, speed) = tokens.q.shape[0], main
    missing = tokens.q.shape[2] - said.k.shape[2]  # tokens that write nothing, of which nothing was said
    scalars = [each.scalars for each in all_writes]
    carried = [
        s.whole_BH if each.carried is None else each.carried for each, s in zip(all_writes, scalars, strict=True)
    ]
    factors = [
        torch.stack([s.whole_BH, mean, s.carry_BH, s.left_BH], -1) for mean, s in zip(carried, scalars, strict=True)
    ]
    parts = [part.fresh for part in tokens.runs(chunk)]

    def state(part: Tensor) -> Tensor:
        return part.squeeze(2).expand(rows, *part.squeeze(2).shape[1:])

    fresh = None if tokens.starts is None else torch.cat([part for part in parts if part is not None], 1)
    return Given(
        q=tokens.q,
        k=F.pad(said.k, (0, 0, 0, missing)) if missing else said.k,
        v=F.pad(said.v, (0, 0, 0, missing)) if missing else said.v,
        rate=F.pad(said.rate, (0, missing)) if missing else said.rate,
        reach=torch.cat([each.reach for each in all_writes], 2),
        write=torch.cat([s.write_BHC for s in scalars], 2),
        hold=None if speed is None else torch.cat([s.hold_BHC for s in scalars], 2),
        turn=torch.stack([each.turn for each in all_writes], 2),
        factors=torch.stack(factors, 2),
        fresh=fresh,
        up=state(net.up),
        down=state(net.down),
        up_speed=None if speed is None else state(speed.up),
        down_speed=None if speed is None else state(speed.down),
        first_up=initial.up[0, :, 0],
        first_down=initial.down[0, :, 0],
        chunk=chunk,
        clip=clip,
    )
