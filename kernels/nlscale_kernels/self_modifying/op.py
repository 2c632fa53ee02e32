"""What all memories of a head share, as an operator: torch's triangular solve, and Triton on a GPU.

B rows, H heads, C tokens of a chunk, K head width.
"""

from typing import Any

import torch
from torch import Tensor

from nlscale_kernels.arguments import check, check_dtypes
from nlscale_kernels.span import between

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # the kernels'; float64 is torch's, on a GPU too
WIDEST = 128  # tokens of a chunk and width of keys that the kernels have tiles for
SCALARS = ("erase", "earlier", "total", "after")


def reached(
    k: Tensor, erase: Tensor, earlier: Tensor, total: Tensor, after: Tensor, document_BC: Tensor | None
) -> Tensor:
    """(I + L)^-T (after K), L_ti = erase_t 2^(earlier_t - total_i) k_t . k_i for i < t of one document: (B, H, C, K).

    Keys (B, H, C, K), scalars (B, H, C).
    """
    L = between(earlier, total, document_BC, -1) * ((erase.unsqueeze(-1) * k) @ k.mT)
    return torch.linalg.solve_triangular(L.mT, after.unsqueeze(-1) * k, upper=True, unitriangular=True)


@torch.library.custom_op("nlscale::reach", mutates_args=())
def reach(
    k: Tensor, erase: Tensor, earlier: Tensor, total: Tensor, after: Tensor, document_BC: Tensor | None
) -> Tensor:
    """See `reached`. Raises ValueError for arguments that do not fit."""
    _check(k, erase, earlier, total, after, document_BC)
    return reached(k, erase, earlier, total, after, document_BC).contiguous()


Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gradients(
    k: Tensor,
    erase: Tensor,
    earlier: Tensor,
    total: Tensor,
    after: Tensor,
    document_BC: Tensor | None,
    said: Tensor,
    d_reach: Tensor,
) -> Five:
    """Of k, erase, earlier, total, after; `said`: what `reached` gave.

    With y = (I + L)^-1 d_reach: d_L = -said y^T below the diagonal.
    """
    shares = between(earlier, total, document_BC, -1)
    products, column = shares * (k @ k.mT), erase.unsqueeze(-1)
    y = torch.linalg.solve_triangular(column * products, d_reach, upper=False, unitriangular=True)
    d_L = -said @ y.mT
    turned = d_L * products
    d_products = d_L * shares * column
    d_k = (d_products + d_products.mT) @ k + after.unsqueeze(-1) * y
    moved = turned * column * torch.log(torch.tensor(2.0, dtype=k.dtype, device=k.device))
    return d_k, turned.sum(-1), moved.sum(-1), -moved.sum(-2), (y * k).sum(-1)


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
    return gradients(k, erase, earlier, total, after, document_BC, said, d_reach)


def _forward_on_gpu(k: Tensor, *rest: Any) -> Tensor:
    from nlscale_kernels.self_modifying import triton

    _check(k, *rest)
    if k.dtype not in NARROW:
        return reached(k, *rest)
    for what, size, field in (("chunk", k.shape[2], "model.self_modifying.chunk"), ("head width", k.shape[3], "heads")):
        check(
            size <= WIDEST,
            f"reach: there is no kernel for a {what} of {size}, above {WIDEST}; another {field}, or train.kernels=reference",
        )
    return triton.reach(k, *rest)


def _backward_on_gpu(k: Tensor, *rest: Any) -> Five:
    from nlscale_kernels.self_modifying import triton

    return triton.gradients(k, *rest) if k.dtype in NARROW else gradients(k, *rest)


reach.register_kernel("cuda")(_forward_on_gpu)
backward.register_kernel("cuda")(_backward_on_gpu)


@reach.register_fake
def _(k: Tensor, *rest: Any) -> Tensor:
    return k.new_empty(k.shape)


@backward.register_fake
def _(k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (k, *rest[:4]))


def _check(k: Tensor, *rest: Tensor | None) -> None:
    check(k.ndim == 4, f"reach: k has shape {tuple(k.shape)}; it takes (B, H, C, K)")
    check_dtypes("reach", (*NARROW, torch.float64), k=k)
    shapes = {**dict.fromkeys(SCALARS, k.shape[:3]), "document": (k.shape[0], k.shape[2])}
    for (name, shape), tensor in zip(shapes.items(), rest, strict=True):
        check(
            tensor is None or (tensor.shape == shape and tensor.device == k.device),
            f"reach: {name} must be {tuple(shape)} on {k.device}, "
            f"and is {tensor is not None and (tuple(tensor.shape), str(tensor.device))}",
        )
    wide = (torch.float64,) if k.dtype == torch.float64 else (torch.float32,)
    check_dtypes("reach", wide, **dict(zip(SCALARS, rest, strict=False)))
    check_dtypes("reach", (torch.int32, torch.int64), document=rest[4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, d_reach: Tensor) -> tuple[Tensor | None, ...]:
    form: Any = gradients if torch.is_grad_enabled() else backward  # somebody differentiates this in turn
    return (*form(*ctx.saved_tensors, d_reach), None)


reach.register_autograd(_backward, setup_context=_save)


def reach_of(
    k: Tensor, erase: Tensor, earlier: Tensor, total: Tensor, after: Tensor, document_BC: Tensor | None
) -> Tensor:
    """The operator on a GPU and where torch.compile traces; else `reached` under autograd."""
    form = reach if k.is_cuda or torch.compiler.is_compiling() else reached
    return form(k, erase, earlier, total, after, document_BC)
