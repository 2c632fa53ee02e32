"""The third sharder, for a shard of the model that one rank alone holds: nothing to reduce, nothing to gather."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlscale.config.levels import Level
from nlscale.config.run import Run
from nlscale.optim.flat_shard import FlatShard, flat_parameter, flats_of
from nlscale.optim.layout import ALIGN
from nlscale.optim.partial import sum_partials
from nlscale.optim.window import Windows
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World


class AloneShard(FlatShard):
    """A group's leaves where there is one copy of them."""

    bytes_a_reduce = bytes_a_gather = 0

    def __init__(self, level: Level, leaves: Sequence[Leaf], run: Run, windows: Windows, world: World) -> None:
        given = flats_of(level, leaves, run, world, ALIGN)
        super().__init__(level, given, [flat_parameter(flat).data for flat in given], run.optim, windows, world)
        self.moved_on = False

    @torch.no_grad()
    def total(self) -> list[Tensor]:
        """The windows in flat memory, as they are; they are zero after."""
        sum_partials(self.windows, self.leaves, self.world)
        grads = []
        for flat in self.flats:
            values = [self.windows.of(leaf) for leaf, _ in flat.places]
            grad = torch.empty(flat.elements, dtype=values[0].dtype, device=values[0].device)
            flat.fill(grad, values)
            used = max(start + leaf.value.numel() for leaf, start in flat.places)
            grad[used:].zero_()
            torch._foreach_zero_(values)
            grads.append(grad)
        return grads

    @torch.no_grad()
    def gather(self) -> None:
        """Writes the new weights."""
        self.write()
        self.moved_on = True

    @torch.no_grad()
    def arrive(self) -> None:
        """Copies slices to where the model computes with them."""
        if self.moved_on:
            self.moved_on = False
            self.publish()
