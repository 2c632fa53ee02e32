"""How far a slower level moves where a faster one moved before: what goes down the cascade of levels, as a number.

Levels have units of their own, in any order, but read the same input. A level's move over a period, D (rows of units,
columns of the input), touches the directions of G = D^T D. The alignment of two levels is the cosine of their G, over all
blocks: 1 where they moved along the same directions of the input, 0 where those are orthogonal; it does not depend on the
order or the sign of units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.levels import Level
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World

INWARD = (".up.weight", ".gate.weight")


@dataclass
class Pair:
    """A level and the next slower one, and their weights when the slower one moved last."""

    fast: str
    slow: str
    period: int
    leaves: dict[str, dict[str, list[Leaf]]]  # block -> level -> its parts that read the input
    since: int = -1  # step of the weights below
    before: dict[str, Tensor] = field(default_factory=dict)  # by leaf


class Alignment:
    """Of all neighbouring levels that move between steps; it holds a copy of their weights that read the input."""

    def __init__(self, levels: Sequence[Level], leaves: Sequence[Leaf], world: World) -> None:
        self.world = world
        moving = [level for level in levels if level.unit == "step" and not level.frozen]
        self.pairs = [
            Pair(fast.name, slow.name, slow.period, blocks(leaves, (fast.name, slow.name)))
            for fast, slow in pairwise(moving)
        ]

    def begin(self, step: int) -> None:
        """Takes the weights as they are; they are all there."""
        for pair in self.pairs:
            self._note(pair, step)

    def due(self, step: int) -> bool:
        """Whether a slower level's period ends with this step."""
        return any(step % pair.period == 0 for pair in self.pairs)

    @torch.no_grad()
    def after(self, step: int) -> dict[str, float]:
        """Faster level -> cosine, of the pairs whose slower level's period ends with this step and was seen whole, where
        both have moved. A collective.
        """
        found: dict[str, float] = {}
        for pair in self.pairs:
            if step % pair.period:
                continue
            both, fast, slow = self._products(pair) if pair.since == step - pair.period else (0.0, 0.0, 0.0)
            if fast and slow:
                found[pair.fast] = both / (fast * slow) ** 0.5
            self._note(pair, step)
        return found

    def _note(self, pair: Pair, step: int) -> None:
        pair.since = step
        for leaf in (each for block in pair.leaves.values() for parts in block.values() for each in parts):
            pair.before[leaf.name] = leaf.value.clone()

    def _products(self, pair: Pair) -> list[float]:
        total = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for block in pair.leaves.values():
            fast, slow = (self._gram(pair, block[name]) for name in (pair.fast, pair.slow))
            total += torch.stack([(a * b).sum() for a, b in ((fast, slow), (fast, fast), (slow, slow))])
        dist.all_reduce(total, group=self.world.pipeline)
        return total.tolist()  # type: ignore[no-any-return]

    def _gram(self, pair: Pair, parts: Sequence[Leaf]) -> Tensor:
        exact = torch.promote_types(parts[0].value.dtype, torch.float32)
        moves = torch.cat([leaf.value.to(exact) - pair.before[leaf.name].to(exact) for leaf in parts])
        gram = moves.mT @ moves
        dist.all_reduce(gram, group=self.world.tensor)
        return gram


def blocks(leaves: Sequence[Leaf], names: tuple[str, str]) -> dict[str, dict[str, list[Leaf]]]:
    """The inward parts of both levels, in the blocks of this rank that have both."""
    found: dict[str, dict[str, list[Leaf]]] = {}
    for leaf in leaves:
        block, _, rest = leaf.name.partition(".continuum.")
        level = rest.split(".")[0]
        if level in names and leaf.name.endswith(INWARD):
            found.setdefault(block, {}).setdefault(level, []).append(leaf)
    return {block: held for block, held in found.items() if len(held) == len(names)}
