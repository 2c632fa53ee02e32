"""The registry and the clock: which leaf belongs to which level, and what moves at a step (spec 2.1, 3.10)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nlscale.config.levels import Level, level_of
from nlscale.config.run import Run
from nlscale.runtime.leaf import Leaf

NO_DECAY = (
    "*norm.weight",
    "embed.weight",
    "*.gains",
    "*.bias",
    "*.gain.*",
    "*.convolution.*",
    "*.persistent.*",
)  # leaves that weight decay spares


@dataclass(frozen=True)
class Group:
    """What moves together: a level, or those of its layers that share a phase."""

    level: Level
    phase: int = 0

    @property
    def name(self) -> str:
        """The level's name; with its phase, where it has one."""
        return f"{self.level.name}+{self.phase}" if self.phase else self.level.name


def phase_of(name: str, level: Level, layers: int) -> int:
    """Steps by which a leaf of block j moves early: floor(j period / layers); other leaves keep the level's beat."""
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) * level.steps // layers if block else 0


def groups(levels: Sequence[Level], layers: int, staggered: bool) -> list[Group]:
    """All groups of a run, fast to slow, the same on every rank whatever it holds."""
    phases = {
        level.name: sorted({phase_of(f"blocks.{j}.", level, layers) for j in range(layers)} | {0}) if staggered else [0]
        for level in levels
    }
    return [Group(level, phase) for level in levels for phase in phases[level.name]]


def by_group(leaves: Iterable[Leaf], levels: Sequence[Level], layers: int, staggered: bool) -> dict[str, list[Leaf]]:
    """Leaves of each group, in the order of `groups`."""
    members: dict[str, list[Leaf]] = {group.name: [] for group in groups(levels, layers, staggered)}
    for leaf in leaves:
        level = level_of(leaf.name, levels)
        phase = phase_of(leaf.name, level, layers) if staggered else 0
        members[Group(level, phase).name].append(leaf)
    return members


def decays(name: str) -> bool:
    """Whether weight decay pulls on a leaf."""
    return not any(fnmatchcase(name, pattern) for pattern in NO_DECAY)


def identity(shapes: Mapping[str, Sequence[int]], run: Run) -> dict[str, str]:
    """Leaf -> its shape, level, clock, rule and decay in one line: what a resume must find unchanged."""
    lines = {}
    for name, shape in sorted(shapes.items()):
        level = level_of(name, run.levels)
        phase = phase_of(name, level, run.model.layers) if run.optim.phase == "staggered" else 0
        clock = "frozen" if level.frozen else f"period={level.steps}" + (f"+{phase}" if phase else "")
        rule = level.optimizer or run.optim.name
        lines[name] = f"{'x'.join(map(str, shape))} {level.name} {clock} {rule} decay={int(decays(name))}"
    return lines
