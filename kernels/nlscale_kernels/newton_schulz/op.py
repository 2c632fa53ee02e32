"""The operators: the reference, and Triton on a GPU; arguments that do not fit are named."""

from typing import Any

import torch
from torch import Tensor

from nlscale_kernels.arguments import alike, check, check_programs, described, on_its_gpu
from nlscale_kernels.newton_schulz import reference
from nlscale_kernels.newton_schulz.reference import by_gram, direct, multiplications

DTYPES = (torch.bfloat16, torch.float16)  # that the kernel takes; float64 is the reference's, on a GPU too
NARROWEST = 256  # rows below which the Gram form's square products do not fill a GPU


@torch.library.custom_op("nlscale::symmetric_product", mutates_args=())
def symmetric_product(
    x_KNM: Tensor, y_KNM: Tensor, add_KNN: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """See reference.symmetric_product. Raises ValueError for arguments that do not fit."""
    _check(x_KNM, y_KNM, add_KNN)
    return reference.symmetric_product(x_KNM, y_KNM, add_KNN, alpha, beta)


@symmetric_product.register_kernel("cuda")
@on_its_gpu
def _(x_KNM: Tensor, y_KNM: Tensor, add_KNN: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    from nlscale_kernels.newton_schulz import triton

    _check(x_KNM, y_KNM, add_KNN)
    if x_KNM.dtype == torch.float64:
        return reference.symmetric_product(x_KNM, y_KNM, add_KNN, alpha, beta)
    check(
        x_KNM.dtype in DTYPES,
        f"symmetric_product: no kernel for {x_KNM.dtype}; {' or '.join(map(str, DTYPES))} would do, or "
        "train.kernels=reference",
    )
    check_programs("symmetric_product", "matrices", len(x_KNM))
    return triton.symmetric_product(x_KNM, y_KNM, add_KNN, alpha, beta)


def _check(x_KNM: Tensor, y_KNM: Tensor, add_KNN: Tensor | None) -> None:
    name = "symmetric_product"
    check(x_KNM.ndim == 3, f"{name}: x has shape {tuple(x_KNM.shape)}; it takes K matrices (K, N, M), [None] would do")
    check(alike(y_KNM, x_KNM.shape, x_KNM), f"{name}: y is {described(y_KNM)}; it must be like x, {described(x_KNM)}")
    square = (*x_KNM.shape[:2], x_KNM.shape[1])
    check(
        add_KNN is None or (alike(add_KNN, square, x_KNM) and add_KNN.is_contiguous()),
        f"{name}: add is {described(add_KNN)}; it must be contiguous, {x_KNM.dtype} {square} on {x_KNM.device}",
    )


@symmetric_product.register_fake
def _(x_KNM: Tensor, y_KNM: Tensor, add_KNN: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    return x_KNM.new_empty(*x_KNM.shape[:2], x_KNM.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, add, ctx.alpha, ctx.beta = inputs
    ctx.adds = add is not None
    ctx.save_for_backward(x, y)


def _backward(ctx: Any, of_KNN: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    d_add = ctx.beta * of_KNN if ctx.adds else None
    return ctx.alpha * (of_KNN @ y), ctx.alpha * (of_KNN.mT @ x), d_add, None, None


symmetric_product.register_autograd(_backward, setup_context=_save)


def orthogonal(x_KNM: Tensor, iterations: int) -> Tensor:
    """Each matrix of norm 1 or less, its singular values driven to about 1, by the form that needs fewer products.

    On a GPU in bfloat16, or float16 in the Gram form, whose products' entries stay below 2; in x's own dtype elsewhere.
    """
    wide = x_KNM if x_KNM.shape[-2] <= x_KNM.shape[-1] else x_KNM.mT
    rows, columns = wide.shape[-2:]
    straight, gram = multiplications(rows, columns, iterations)
    shorter = gram < straight and rows >= NARROWEST
    narrow = x_KNM.is_cuda and x_KNM.dtype != torch.float64
    work = wide.to((torch.float16 if shorter else torch.bfloat16) if narrow else wide.dtype)
    done = (by_gram if shorter else direct)(work, iterations, symmetric_product).to(x_KNM.dtype)
    return done if wide is x_KNM else done.mT
