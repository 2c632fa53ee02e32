"""The registry and the clock: which leaf belongs to which level, and which levels move at a step (spec 2.1)."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from nlscale.config.model import Level
from nlscale.runtime.leaf import Leaf

NO_DECAY = ("*norm.weight", "embed.weight")  # leaves that weight decay spares


def due(level: Level, step: int) -> bool:
    """Whether `level` moves at the end of `step`, counted from 1. A pure function of the step: no rank keeps a clock."""
    return step % level.period == 0


def level_of(name: str, levels: Sequence[Level]) -> Level:
    """The level of a leaf: its continuum's by name, the first level for everything else."""
    for level in levels:
        if fnmatchcase(name, f"blocks.*.continuum.{level.name}.*"):
            return level
    return levels[0]


def by_level(leaves: Iterable[Leaf], levels: Sequence[Level]) -> dict[str, list[Leaf]]:
    """Leaves of each level, in the order of `levels`."""
    groups: dict[str, list[Leaf]] = {level.name: [] for level in levels}
    for leaf in leaves:
        groups[level_of(leaf.name, levels).name].append(leaf)
    return groups


def decays(name: str) -> bool:
    """Whether weight decay pulls on a leaf."""
    return not any(fnmatchcase(name, pattern) for pattern in NO_DECAY)


def identity(shapes: Mapping[str, Sequence[int]], levels: Sequence[Level]) -> dict[str, str]:
    """Leaf -> its shape, level, period and decay in one line: what a resume must find unchanged."""
    lines = {}
    for name, shape in sorted(shapes.items()):
        level = level_of(name, levels)
        size = "x".join(map(str, shape))
        lines[name] = f"{size} {level.name} period={level.period} decay={int(decays(name))}"
    return lines
