"""A run's loss curve, which its leading rank draws while every other one waits."""

import time

from nlscale.runtime.folder import Folder
from nlscale.runtime.log import Journal

RARELY = 100  # times as long as a drawing takes lie between one and the next
FIRST = 1.0  # seconds that one is taken to need, before one was drawn


class Curve:
    """plots/loss.png, renewed at a save unless the last drawing is too young, and when a run ends."""

    def __init__(self, folder: Folder, journal: Journal) -> None:
        self.folder, self.journal = folder, journal
        self.drawn, self.took = time.monotonic(), FIRST

    def renew(self, step: int, ends: bool) -> None:
        """Draws, where it is time; a disk that refuses it is no reason to end."""
        began = time.monotonic()
        if not ends and began - self.drawn < RARELY * self.took:
            return
        from nlscale.train.plot import plot  # matplotlib, which no other rank needs

        try:
            plot([self.folder], self.folder.plot)
        except OSError as error:
            self.journal.event("plot failed", step, reason=str(error))
        self.drawn = time.monotonic()
        self.took = self.drawn - began
