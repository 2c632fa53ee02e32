"""Orthogonalisation by Newton-Schulz iteration (spec 2.10: eqs. 42-44 in their quintic form; Jordan et al., 2024).

X -> a X + b (X X^T) X + c (X X^T)^2 X drives all singular values to about 1. On a matrix that is cut, the Gram product
contracts the cut axis, so that an iteration costs one all-reduce of a square matrix.
"""

import torch
from torch import Tensor

from nlscale.optim.split import Split

QUINTIC = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def newton_schulz(x_KOI: Tensor, iterations: int, split: Split) -> Tensor:
    """The nearest orthogonal factor of each matrix, approximately: singular values within about [0.7, 1.2].

    bfloat16 products on a GPU, the input's precision elsewhere. A collective over the split's ranks.
    """
    x = x_KOI / (split.norm(x_KOI) + EPS)
    work = x.bfloat16() if x.is_cuda and x.dtype == torch.float32 else x
    if gathers(split, x_KOI, iterations, work.element_size()):
        (done,) = split.whole(lambda whole: [iterate(whole, iterations, Split())], work)
    else:
        done = iterate(work, iterations, split)
    return done.to(x_KOI.dtype)


def gathers(split: Split, x_KOI: Tensor, iterations: int, element: int) -> bool:
    """Whether handing whole matrices around moves less than an all-reduce of a Gram matrix an iteration (spec 3.7)."""
    if split.axis is None:
        return False
    rows, columns = split.shape(x_KOI)
    side = rows if split.axis == 1 else columns
    return 2 * rows * columns * element < iterations * 2 * side * side * 4


def iterate(x_KOI: Tensor, iterations: int, split: Split) -> Tensor:
    """The iterations, by the Gram matrix of the axis that is whole; on whole matrices, of the shorter one."""
    a, b, c = QUINTIC
    rows, columns = x_KOI.shape[-2:]
    by_rows = split.axis == 1 or (split.axis is None and rows <= columns)
    for _ in range(iterations):
        gram = split.left(x_KOI, x_KOI) if by_rows else split.right(x_KOI, x_KOI)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x_KOI = torch.baddbmm(x_KOI, *((polynomial, x_KOI) if by_rows else (x_KOI, polynomial)), beta=a)
    return x_KOI
