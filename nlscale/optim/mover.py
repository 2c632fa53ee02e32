"""A group on one rank: what moves together, and what a move did."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nlscale.optim.grams import Grams
from nlscale.optim.levels import Group
from nlscale.optim.reduce import Open, Policy
from nlscale.optim.shard import Sharder, square
from nlscale.runtime.leaf import Leaf


@dataclass(frozen=True)
class Moved:
    """What a level's move did. A window with a gradient that is not finite, or without any target, is dropped on all ranks
    alike.
    """

    grad_norm: float  # of the window's mean, before clipping; infinite or NaN where it was dropped
    skipped: bool
    update_square: Tensor  # float64: squared norm of this rank's part of the weight change


@dataclass
class Mover:
    """A group on this rank: its shards, and the policy of each."""

    group: Group
    shards: list[Sharder]
    policies: list[Policy]
    grams: list[Grams]  # inputs of matrices that follow the delta rule

    @property
    def counted(self) -> list[list[list[slice]]]:
        """By shard, by flat: what norms count."""
        return [shard.counted for shard in self.shards]

    @property
    def leaves(self) -> list[Leaf]:
        """All leaves."""
        return [leaf for shard in self.shards for leaf in shard.leaves]

    @property
    def bytes_a_step(self) -> int:
        """Bytes this rank sends on a ring at every step."""
        return sum(policy.bytes_a_step for policy in self.policies)

    @property
    def bytes_a_move(self) -> int:
        """Bytes this rank sends on a ring when the group moves, beside those of every step."""
        closing = sum(policy.bytes_a_close for policy in self.policies) + sum(gram.bytes_a_close for gram in self.grams)
        return closing + sum(shard.bytes_a_gather for shard in self.shards)

    def square(self, grads: Sequence[Sequence[Tensor]]) -> Tensor:
        """Sum of squares of what this rank counts, float64."""
        return torch.stack([square(g, spans) for g, spans in zip(grads, self.counted, strict=True)]).sum()

    def open_sums(self) -> list[Open]:
        """What is open between steps: gradients, and inputs where a rule asks for them."""
        found: list[Open] = list(self.policies)
        return found + list(self.grams)

    def finite(self) -> Tensor:
        """Whether everything that is open on this rank is finite: a bool scalar."""
        values = [f.values["window"].isfinite().all() for each in self.open_sums() for f in each.open()]
        return torch.stack(values).all() if values else torch.tensor(True)  # a part may be nothing but padding

    def empty(self) -> None:
        """Forgets everything that is open."""
        for each in self.open_sums():
            for fragment in each.open():
                fragment.values["window"].zero_()
