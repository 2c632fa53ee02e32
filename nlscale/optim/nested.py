"""The nested variant: a fast level starts anew from its slow copy at the slower level's boundary (spec 2.4; eq. 72).

The slow copy of level l is a parameter of level l + 1. First order, at a boundary of that level:

    slow += weight (fast - slow);  fast = slow;  moments of the fast rule = 0

Second order (`optim.second_order`, one process): the slow copy follows the gradient of the window's own losses through
the fast steps that it took (train/second_order.py), slow -= rate gradient, before fast = slow.

First order is Lookahead with k = slower period / faster period (Zhang et al., 2019). It is element-wise, so it runs on this
rank's part of the master; the gather that the fast level's own move needs anyway carries the result.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nlscale.config.levels import Level
from nlscale.config.optim import STATES
from nlscale.optim.layout import Flat
from nlscale.optim.levels import Group
from nlscale.optim.rules import Rule

if TYPE_CHECKING:
    from nlscale.optim.mover import Mover

MOMENTS = {name for states in STATES.values() for name in states}
SLOW = "slow"  # the slow copy's name among a rule's state


class Anchors:
    """The slow copies of all fast levels on this rank."""

    def __init__(self, levels: Sequence[Level], weight: float, movers: Mapping[str, "Mover"]) -> None:
        """`levels`, fast to slow; none where the variant has no slow copies."""
        self.slower = {fast.name: slow.name for fast, slow in zip(levels, levels[1:], strict=False)}
        self.weight = weight
        self.gradients: dict[str, Tensor] = {}  # leaf -> rate x gradient of its slow copy; first order where none is
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
                            self.follow(flat, rule)

    def follow(self, flat: Flat, rule: Rule) -> None:
        """The slow copy takes its step, and the fast level begins anew from it."""
        slow = rule.state[SLOW]
        if any(leaf.name in self.gradients for leaf, _ in flat.places):
            for (leaf, _), view in zip(flat.places, flat.views(slow), strict=True):  # one process holds it whole
                view.sub_(self.gradients.pop(leaf.name))
        else:
            slow.add_(rule.master - slow, alpha=self.weight)
        rule.master.copy_(slow)
        restart(rule)


def restart(rule: Rule) -> None:
    """The rule forgets its moments; what it keeps beside them (the slow copy, earlier tasks) stays."""
    for name, tensor in rule.state.items():
        if name in MOMENTS:
            tensor.zero_()
    rule.updates = 0
