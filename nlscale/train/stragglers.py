"""Stragglers: ranks that take longer than the others for their share of a step, named with their hosts."""

import socket
from statistics import median, median_low

import torch
import torch.distributed as dist

from nlscale.runtime.log import Journal
from nlscale.runtime.world import World

STEPS = 20  # that one look counts
SLOW, LEAST = 1.5, 0.02  # times the median, and seconds above it, from which a rank is named


class Stragglers:
    """Compares what each rank's rows, forward and backward take, over STEPS steps.

    Ranks of one replica wait for each other inside them, so that a slow one names its whole replica.
    """

    def __init__(self, world: World, journal: Journal) -> None:
        """A collective."""
        self.world, self.journal, self.mine = world, journal, list[float]()
        self.hosts: list[str] = [""] * world.size
        dist.all_gather_object(self.hosts, socket.gethostname())

    def heard(self, step: int, seconds: float) -> None:
        """One step of this rank. Every STEPS steps a collective."""
        self.mine.append(seconds)
        if len(self.mine) < STEPS:
            return
        each = torch.zeros(self.world.size, dtype=torch.float64, device=self.world.device)
        each[self.world.rank] = median(self.mine)
        dist.all_reduce(each)
        self.mine.clear()
        found, usual = each.tolist(), median_low(each.tolist())
        for rank, taken in enumerate(found):
            if taken > SLOW * usual and taken > usual + LEAST:
                self.journal.event("straggler", step, rank=rank, at=self.hosts[rank], seconds=taken, median=usual)
                who = f"rank {rank} (host {self.hosts[rank]})"
                self.journal.say(f"{who} takes {taken:.3g} s for its share of a step, the others {usual:.3g} s")
