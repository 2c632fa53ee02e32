"""Delta Gradient Descent (spec 2.11; Behrouz et al., 2025, eqs. 56, 57 in their corrected form): weights also forget
along the inputs that they saw.

The proximal step of the least-squares objective 1/2 |W x - u|^2 over a window of n inputs, u = -dL/dy, is

    W' = (W - lr g) (I + lr G)^-1        g = mean dL/dy x^T, the window's gradient;  G = mean x x^T

which for one input is W (I - a x x^T) - a dL/dy x^T with a = lr / (1 + lr |x|^2). G is gathered beside the window: one
matrix of inputs x inputs a linear layer and group (optim/grams.py).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.optim.matrices import Part
from nlscale.optim.split import Split


def delta_step(
    master: Tensor, decay: float, parts: Sequence[Part], tensor: dist.ProcessGroup | None, inputs: Mapping[str, Tensor]
) -> Callable[[Tensor, float, float, int], None]:
    """The rule on this rank's matrices; `inputs`: leaf name -> G (float32, inputs x inputs)."""

    @torch.no_grad()
    def step(grad: Tensor, rate: float, scale: float, update: int) -> None:
        for part in parts:
            leaf, weight = part.leaf, part.of(master)
            assert leaf is not None
            forget = inputs[leaf.name].to(master).mul(rate)
            forget.diagonal().add_(1)
            aim = weight * (1 - rate * decay) - rate * scale * part.of(grad)
            solve = along_rows if leaf.meets == 0 else along_columns
            split = Split(tensor, leaf.shard if leaf.shard == leaf.meets else None)
            (moved,) = split.whole(lambda whole, solve=solve, forget=forget: [solve(whole, forget)], aim[None])
            weight.copy_(moved[0])

    return step


def along_columns(w_KOI: Tensor, forget_II: Tensor) -> Tensor:
    """w F^-1 for a symmetric F."""
    return torch.linalg.solve(forget_II, w_KOI.mT).mT


def along_rows(w_KIO: Tensor, forget_II: Tensor) -> Tensor:
    """F^-1 w."""
    return torch.linalg.solve(forget_II, w_KIO)
