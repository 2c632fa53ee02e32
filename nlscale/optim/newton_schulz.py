"""Orthogonalisation of matrices that tensor parallelism may cut (spec 2.10, 3.7).

The Gram product of a cut matrix contracts the cut axis, so that an iteration costs one all-reduce of a square matrix; where
handing whole matrices around moves less, each rank iterates on its share of them.
"""

import torch
from nlscale_kernels.newton_schulz import QUINTIC, orthogonal, symmetric_product
from torch import Tensor

from nlscale.optim.split import Split

EPS = 1e-7


def newton_schulz(x_KOI: Tensor, iterations: int, split: Split) -> Tensor:
    """The nearest orthogonal factor of each matrix, approximately: singular values within about [0.7, 1.2].

    Half precision on a GPU, the input's elsewhere. A collective over the split's ranks.
    """
    x = x_KOI / (split.norm(x_KOI) + EPS)
    if split.axis is None:
        return orthogonal(x, iterations)
    work = x.bfloat16() if x.is_cuda and x.dtype == torch.float32 else x
    if gathers(split, x_KOI, iterations, work.element_size()):
        (done,) = split.whole(lambda whole: [orthogonal(whole, iterations)], work)
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
    """The iterations on a cut matrix, by the Gram matrix of the axis that is whole."""
    a, b, c = QUINTIC
    x = x_KOI if split.axis == 1 else x_KOI.mT
    for _ in range(iterations):
        gram = split.sum(symmetric_product(x, x))
        x = torch.baddbmm(x, symmetric_product(gram, gram, gram, alpha=c, beta=b), x, beta=a)
    return x if split.axis == 1 else x.mT
