"""The optimizer of a run: windows, one shard a level, and the clock that says who moves."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nlscale.config.model import Level
from nlscale.config.optim import Optim
from nlscale.optim.levels import by_level, due
from nlscale.optim.schedule import level_rate
from nlscale.optim.shard import LevelShard, Moved, forbid_compilation, silence
from nlscale.optim.window import Windows
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World


@dataclass
class Optimizer:
    """All levels of this rank."""

    optim: Optim
    steps: int
    windows: Windows
    shards: dict[str, LevelShard]

    def step(self, step: int, tokens: Tensor) -> dict[str, Moved]:
        """Ends step `step` (from 1), whose backward passes added `tokens` targets; gives the levels that moved.

        A level that is not due is not touched: no collective, no optimizer work, no read by the host.
        """
        self.windows.count(tokens)
        return {
            name: shard.move(level_rate(self.optim, shard.level, step, self.steps))
            for name, shard in self.shards.items()
            if due(shard.level, step)
        }

    def flush(self, step: int) -> dict[str, Moved]:
        """At the run's end, moves every level whose window is still open: its mean counts the tokens that it has."""
        return {
            name: shard.move(level_rate(self.optim, shard.level, step, self.steps))
            for name, shard in self.shards.items()
            if self.windows.open[name]
        }


def build_optimizer(
    optim: Optim, levels: Sequence[Level], steps: int, leaves: Sequence[Leaf], world: World
) -> Optimizer:
    """Windows over all stored parameters and an engine for each level that has leaves. A collective over all ranks."""
    forbid_compilation()
    silence()
    groups = by_level(leaves, levels)
    held = [level for level in levels if groups[level.name]]
    windows = Windows([leaf.parameter for leaf in leaves], [level.name for level in held])
    shards = {level.name: LevelShard(level, groups[level.name], optim, windows, world) for level in held}
    return Optimizer(optim, steps, windows, shards)
