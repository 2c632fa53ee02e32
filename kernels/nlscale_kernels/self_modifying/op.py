"""What all memories of a head share, as an operator: torch's triangular solve, and Triton on a GPU.

B rows, H heads, C tokens of a chunk, K head width.
"""

from collections.abc import Callable
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nlscale_kernels import in_turn
from nlscale_kernels.arguments import NARROW, check, check_dtypes, check_programs, described, on_its_gpu
from nlscale_kernels.span import between

WIDEST = 128  # tokens of a chunk and width of keys that the kernels have tiles for
LN2 = log(2)


class Given(NamedTuple):
    """What the operator is given."""

    k: Tensor  # (B, H, C, K)
    erase: Tensor  # (B, H, C), as the three after it
    earlier: Tensor
    total: Tensor
    after: Tensor
    document: Tensor | None  # (B, C): numbers that differ between documents; None: one document


class Gradients(NamedTuple):
    """Of the tensors, in their order."""

    k: Tensor
    erase: Tensor
    earlier: Tensor
    total: Tensor
    after: Tensor


def reached(given: Given) -> Tensor:
    """(I + L)^-T (after K), L_ti = erase_t 2^(earlier_t - total_i) k_t . k_i for i < t of one document: (B, H, C, K).

    Computed in the scalars' dtype, given in that of the keys.
    """
    k = given.k.to(given.erase.dtype)
    L = between(given.earlier, given.total, given.document, -1) * ((given.erase.unsqueeze(-1) * k) @ k.mT)
    rows = (given.after.unsqueeze(-1) * k).mT  # solved from the right, which takes half the time on a CPU
    found = torch.linalg.solve_triangular(L, rows, upper=False, left=False, unitriangular=True).mT
    return found.to(given.k.dtype)


@torch.library.custom_op("nlscale::reach", mutates_args=())
def reach(
    k: Tensor, erase: Tensor, earlier: Tensor, total: Tensor, after: Tensor, document_BC: Tensor | None
) -> Tensor:
    """See `reached`. Raises ValueError for arguments that do not fit."""
    given = Given(k, erase, earlier, total, after, document_BC)
    _check(given)
    return reached(given).contiguous()


def gradients(given: Given, said: Tensor, d_reach: Tensor) -> Gradients:
    """From that of what `reached` said. With y = (I + L)^-1 d_reach: d_L = -said y^T below the diagonal."""
    k, said, d_reach = (x.to(given.erase.dtype) for x in (given.k, said, d_reach))
    shares, column = between(given.earlier, given.total, given.document, -1), given.erase.unsqueeze(-1)
    products = shares * (k @ k.mT)
    lower = (column * products).mT  # solved from the right, as above
    y = torch.linalg.solve_triangular(lower, d_reach.mT, upper=True, left=False, unitriangular=True).mT
    minus_L = said @ y.mT
    turned = products.mul_(minus_L)
    d_erase, d_total = -turned.sum(-1), (given.erase.unsqueeze(-2) @ turned).squeeze(-2).mul_(LN2)
    along = minus_L.mul_(shares).mul_(column)
    d_k = (given.after.unsqueeze(-1) * y).sub_(along @ k).sub_(along.mT @ k)
    return Gradients(d_k.to(given.k.dtype), d_erase, LN2 * given.erase * d_erase, d_total, (y * k).sum(-1))


@torch.library.custom_op("nlscale::reach_backward", mutates_args=())
def backward(
    k: Tensor,
    erase: Tensor,
    earlier: Tensor,
    total: Tensor,
    after: Tensor,
    document_BC: Tensor | None,
    said: Tensor,
    d_reach: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `gradients`."""
    return gradients(Given(k, erase, earlier, total, after, document_BC), said, d_reach)


def _forward_on_gpu(*arguments: Any) -> Tensor:
    from nlscale_kernels.self_modifying import triton

    given = Given(*arguments)
    _check(given)
    if given.k.dtype not in NARROW:
        return reached(given)
    (_, _, chunk, width), field = given.k.shape, "model.self_modifying"
    for what, size, other in (
        ("chunk", chunk, f"another {field}.chunk"),
        ("head width", width, f"more model.heads (or, with {field}.per_layer, fewer {field}.hidden)"),
    ):
        check(
            size <= WIDEST,
            f"reach: no kernel for a {what} of {size}, above {WIDEST}; {other} would do, or train.kernels=reference",
        )
    check_programs("reach", "rows x heads", given.k.shape[0] * given.k.shape[1])
    return triton.reach(given)


def _backward_on_gpu(*arguments: Any) -> Gradients:
    from nlscale_kernels.self_modifying import triton

    *inputs, said, d_reach = arguments
    given = Given(*inputs)
    return (triton.gradients if given.k.dtype in NARROW else gradients)(given, said, d_reach)


reach.register_kernel("cuda")(on_its_gpu(_forward_on_gpu))
backward.register_kernel("cuda")(on_its_gpu(_backward_on_gpu))


@reach.register_fake
def _(k: Tensor, *rest: Any) -> Tensor:
    return k.new_empty(k.shape)


@backward.register_fake
def _(k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (k, *rest[:4]))


def _check(given: Given) -> None:
    k = given.k
    check(k.ndim == 4, f"reach: k has shape {tuple(k.shape)}; it takes (B, H, C, K)")
    check_dtypes("reach", (*NARROW, torch.float64), k=k)
    scalars = {name: getattr(given, name) for name in ("erase", "earlier", "total", "after")}
    shapes = {**dict.fromkeys(scalars, k.shape[:3]), "document": (k.shape[0], k.shape[2])}
    for name, shape in shapes.items():
        tensor = getattr(given, name)
        check(
            tensor is None or (tensor.shape == shape and tensor.device == k.device),
            f"reach: {name} is {described(tensor)}; it must be {tuple(shape)} on {k.device}",
        )
    check_dtypes("reach", (torch.float64,) if k.dtype == torch.float64 else (torch.float32,), **scalars)
    check_dtypes("reach", (torch.int32, torch.int64), document=given.document)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _derived(ctx: Any, d_reach: Tensor, found: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    *given, said = ctx.saved_tensors
    if in_turn.asked():
        return (*in_turn.gradients(lambda *each: (reached(Given(*each)),), given, (d_reach,)),)
    return (*found(*given, said, d_reach), None)


reach.register_autograd(lambda ctx, d_reach: _derived(ctx, d_reach, backward), setup_context=_save)


class Plainly(torch.autograd.Function):
    """`reached` without an operator's dispatch: torch.compile fuses what lies around its products and its solve."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        """See `reached`."""
        _check(Given._make(given))
        said = in_turn.anew(reached(Given._make(given)))
        ctx.save_for_backward(*given, said)
        return said

    @staticmethod
    def backward(ctx: Any, d_reach: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """See `gradients`; differentiable in turn."""
        return _derived(ctx, d_reach, lambda *each: gradients(Given(*each[:-2]), *each[-2:]))


def arriving(given: Given) -> Tensor:
    """Where each token's write arrives: the operator on a GPU; on a CPU `Plainly`."""
    arrives: Tensor = Plainly.apply(*given) if given.k.is_cpu else reach(*given)
    return arrives
