"""Orthogonalisation by Newton-Schulz iteration (spec 2.10: eqs. 42-44 in their quintic form; Jordan et al., 2024).

    X <- a X + b (X X^T) X + c (X X^T)^2 X

drives all singular values to about 1. K matrices of one shape as a batch; N rows, M columns, N <= M where it matters.
"""

from collections.abc import Callable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
RESTART = 3  # iterations of the Gram form on one Gram matrix, at most; the last run is the longest

Product = Callable[..., Tensor]


def symmetric_product(
    x_KNM: Tensor, y_KNM: Tensor, add_KNN: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha x y^T + beta add (K, N, N). The caller's word: the product is symmetric, so half of it is enough."""
    if add_KNN is None:
        return alpha * (x_KNM @ y_KNM.mT)
    return torch.baddbmm(add_KNN, x_KNM, y_KNM.mT, beta=beta, alpha=alpha)


def direct(x_KNM: Tensor, iterations: int, product: Product = symmetric_product) -> Tensor:
    """The iteration as it stands: 3 N^2 M + N^3 products of numbers an iteration, where symmetry halves two of them."""
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = product(x_KNM, x_KNM)
        polynomial = product(gram, gram, gram, alpha=c, beta=b)
        x_KNM = torch.baddbmm(x_KNM, polynomial, x_KNM, beta=a)
    return x_KNM


def by_gram(x_KNM: Tensor, iterations: int, product: Product = symmetric_product) -> Tensor:
    """The same on the Gram matrix R = X X^T alone: with Z = a I + b R + c R^2, X <- Z X is R <- Z R Z.

    Z and R are polynomials of one matrix, so all products are symmetric: about 4 N^3 an iteration, whatever M is. Rounding
    leaves small eigenvalues of R below zero, which each iteration on R multiplies by a^2, so X is made and R computed anew
    after every RESTART iterations at most.
    """
    a, b, c = QUINTIC
    for count in runs(iterations):
        gram, together = product(x_KNM, x_KNM), None
        for i in range(count):
            step = product(gram, gram, gram, alpha=c, beta=b)
            step.diagonal(dim1=-2, dim2=-1).add_(a)
            together = step if together is None else product(step, together)
            if i + 1 < count:
                gram = product(step, product(step, gram))
        assert together is not None
        x_KNM = together @ x_KNM
    return x_KNM


def runs(iterations: int) -> list[int]:
    """Iterations on one Gram matrix."""
    count = -(-iterations // RESTART)
    return [(iterations + i) // count for i in range(count)]


def multiplications(rows: int, columns: int, iterations: int) -> tuple[int, int]:
    """Products of numbers of `direct` and of `by_gram` for N x M, where symmetric products cost half."""
    n, m = rows, columns
    square, wide = n**3, n**2 * m
    gram = sum(wide // 2 + wide + square * (4 * count - 3) // 2 for count in runs(iterations))
    return iterations * (wide // 2 + square // 2 + wide), gram
