"""What levels do at a step, as rows of one table on the device: no branch on the host, one launch for all levels.

fire       0: nothing of this level is touched
scale      on gradients, first: 1 / tokens of the window, times the clip
rate, decay, eps, and of the moments: beta1, beta2, correct1 = 1 / (1 - beta1^t), correct2 = 1 / sqrt(1 - beta2^t)
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

BLOCK = 1024  # elements; a block belongs to one level


@dataclass(frozen=True)
class AdamW:
    """A row for `adamw`."""

    fire: float
    scale: float
    rate: float
    decay: float
    eps: float
    beta1: float
    beta2: float
    correct1: float
    correct2: float

    @classmethod
    def at(
        cls, update: int, rate: float, betas: tuple[float, float], eps: float, decay: float, scale: float = 1.0
    ) -> "AdamW":
        """The row of a level that makes its `update`-th move (from 1)."""
        first, second = betas
        return cls(1.0, scale, rate, decay, eps, first, second, 1 / (1 - first**update), (1 - second**update) ** -0.5)

    @classmethod
    def rest(cls) -> "AdamW":
        """The row of a level that is not due."""
        return cls(*[0.0] * 9)


@dataclass(frozen=True)
class Momenta:
    """A row for `momenta`: momentum = keep momentum + gain g; sum += g.

    Where slow_fire is not 0, slow = slow_keep slow + slow_gain sum, and sum = 0.
    """

    fire: float
    scale: float
    keep: float
    gain: float
    slow_fire: float = 0.0
    slow_keep: float = 0.0
    slow_gain: float = 0.0


@dataclass(frozen=True)
class Descend:
    """A row for `descend`: weight = (1 - rate decay) weight - rate direction."""

    fire: float
    rate: float
    decay: float


def table(rows: Sequence[AdamW] | Sequence[Momenta] | Sequence[Descend], like: Tensor) -> Tensor:
    """One row a level, in the dtype and on the device of `like`."""
    on_host = torch.tensor([astuple(row) for row in rows], dtype=like.dtype, pin_memory=like.is_cuda)
    return on_host.to(like.device, non_blocking=True)
