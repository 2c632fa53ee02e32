"""Replay into levels (spec 1, row 30): earlier rows are read beside new ones, and their gradients reach some levels only.

While replayed rows are on their way back, every level's gradient is multiplied by what a replayed target counts there
(`levels.X.replay`), 0 for most; its window counts as many targets. So such a level learns from the mean over both, and
the others see nothing of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nlscale.config.levels import Level, level_of
from nlscale.runtime.leaf import Leaf


class Replay:
    """What replayed targets count, by stored parameter."""

    def __init__(self, leaves: Sequence[Leaf], levels: Sequence[Level]) -> None:
        self.reading = False
        by_parameter: dict[nn.Parameter, list[Leaf]] = {}
        for leaf in leaves:
            by_parameter.setdefault(leaf.parameter, []).append(leaf)
        for parameter, members in by_parameter.items():
            share = shares(parameter, members, levels)
            parameter.register_hook(lambda grad, share=share: grad * share if self.reading else grad)

    @contextmanager
    def read(self) -> Iterator[None]:
        """Backward passes inside are of replayed rows."""
        self.reading = True
        try:
            yield
        finally:
            self.reading = False


def shares(parameter: nn.Parameter, leaves: Sequence[Leaf], levels: Sequence[Level]) -> Tensor:
    """What a replayed target counts for each part of a stored parameter: a scalar, or one number a row or column."""
    each = [level_of(leaf.name, levels).replay for leaf in leaves]
    if len(set(each)) == 1:
        return torch.tensor(each[0], dtype=parameter.dtype, device=parameter.device)
    share = torch.zeros_like(parameter.data)
    for leaf, weight in zip(leaves, each, strict=True):
        leaf.of(share).fill_(weight)
    (axis,) = {leaf.axis for leaf in leaves}
    return share.select(1 - axis, 0).unsqueeze(1 - axis).clone()
