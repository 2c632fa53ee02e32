"""The nested variant: a fast level starts anew from its slow copy at the slower level's boundary (spec 2.4; eq. 72).

The slow copy of level l is a parameter of level l + 1. First order, at a boundary of that level:

    slow += weight (fast - slow);  fast = slow;  moments of the fast rule = 0

which is Lookahead with k = slower period / faster period (Zhang et al., 2019). It is element-wise, so it runs on this
rank's part of the master; the gather that the fast level's own move needs anyway carries the result.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from nlscale.config.levels import Level
from nlscale.optim.levels import Group
from nlscale.optim.rules import Rule

if TYPE_CHECKING:
    from nlscale.optim.build import Mover

SLOW = "slow"  # the slow copy's name among a rule's state


class Anchors:
    """The slow copies of all fast levels on this rank."""

    def __init__(self, levels: Sequence[Level], weight: float, movers: Mapping[str, "Mover"]) -> None:
        """`levels`, fast to slow; none where the variant has no slow copies."""
        self.slower = {fast.name: slow.name for fast, slow in zip(levels, levels[1:], strict=False)}
        self.weight = weight
        for mover in movers.values():
            for shard in mover.shards:
                for flat, rule in zip(shard.flats, shard.rules, strict=True):
                    if flat.kind.nested:
                        rule.state[SLOW] = rule.master.clone()

    @torch.no_grad()
    def reset(self, moved: Sequence[Group], movers: Mapping[str, "Mover"]) -> None:
        """After these groups moved: resets each level whose slower neighbour is among them."""
        boundary = {group.level.name for group in moved}
        for group in moved:
            if self.slower.get(group.level.name) in boundary and group.name in movers:
                for shard in movers[group.name].shards:
                    for flat, rule in zip(shard.flats, shard.rules, strict=True):
                        if flat.kind.nested:
                            follow(rule, self.weight)


def follow(rule: Rule, weight: float) -> None:
    """slow += weight (fast - slow); fast = slow; the rule begins anew."""
    slow = rule.state[SLOW]
    slow.add_(rule.master - slow, alpha=weight)
    rule.master.copy_(slow)
    for name, tensor in rule.state.items():
        if name != SLOW:
            tensor.zero_()
    rule.updates = 0
