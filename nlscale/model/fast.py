"""Fast weights: what a level of one sequence has learned inside it, beside the slow weights it began at (spec 2.3).

A level's feed-forward slice has weights W_in (U, D) for each inward part and W_down (U, D). What n written tokens add is

    W_in  -= rate sum_s g_s x_s^T        g: gradient at W_in x, x: the normed input
    W_down -= rate sum_s a_s d_s^T       a: hidden units, d: gradient at the block's output

kept as matrices (`Whole`) or as the pairs themselves (`Factors`; V22), which are smaller while little is written. Both are
values: `written` gives the next one. B rows (1 where all rows share), T tokens of a chunk, D width, U units of this rank.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Tokens' factors of a gradient: left (B, T, U) and right (B, T, D), whose products add up over tokens."""

    left: Tensor
    right: Tensor

    def square(self) -> Tensor:
        """Squared norm of the sum of products, a row: (B,)."""
        return ((self.left @ self.left.mT) * (self.right @ self.right.mT)).sum((1, 2))


@dataclass(frozen=True)
class Whole:
    """The change as a matrix (B, U, D); None: nothing was written."""

    change: Tensor | None = None

    def inward(self, x_BTD: Tensor) -> Tensor | float:
        """What it adds to W x (B, T, U)."""
        return 0.0 if self.change is None else x_BTD @ self.change.mT

    def outward(self, a_BTU: Tensor) -> Tensor | float:
        """What it adds to W^T a (B, T, D)."""
        return 0.0 if self.change is None else a_BTU @ self.change

    def written(self, gathered: "list[Pair] | Tensor", rate: Tensor) -> "Whole":
        """After a step of `rate` (B,) against a gradient."""
        gradient = gathered if isinstance(gathered, Tensor) else product(gathered)
        move = -rate.view(-1, 1, 1) * gradient
        return Whole(move if self.change is None else self.change + move)


@dataclass(frozen=True)
class Factors:
    """The change as pairs, the rates in the left ones."""

    pairs: tuple[Pair, ...] = field(default_factory=tuple)

    def inward(self, x_BTD: Tensor) -> Tensor | float:
        """What it adds to W x (B, T, U)."""
        return sum(((x_BTD @ pair.right.mT) @ pair.left for pair in self.pairs), 0.0)

    def outward(self, a_BTU: Tensor) -> Tensor | float:
        """What it adds to W^T a (B, T, D)."""
        return sum(((a_BTU @ pair.left.mT) @ pair.right for pair in self.pairs), 0.0)

    def written(self, gathered: "list[Pair] | Tensor", rate: Tensor) -> "Factors":
        """After a step of `rate` (B,) against a gradient."""
        assert not isinstance(gathered, Tensor)
        joined = Pair(torch.cat([p.left for p in gathered], 1), torch.cat([p.right for p in gathered], 1))
        return Factors((*self.pairs, replace(joined, left=-rate.view(-1, 1, 1) * joined.left)))


Fast = Whole | Factors


def product(pairs: list[Pair]) -> Tensor:
    """The sum of products (B, U, D)."""
    return sum((pair.left.mT @ pair.right for pair in pairs[1:]), pairs[0].left.mT @ pairs[0].right)
