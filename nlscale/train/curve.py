"""A run's loss curve, which its leading rank draws while every other one waits."""

import time
from types import TracebackType

from nlscale.runtime.folder import Folder
from nlscale.runtime.log import Journal

RARELY = 100  # times as long as a drawing takes lie between one and the next


class Curve:
    """plots/loss.png, renewed at a save unless the last drawing is too young, and when a run ends, however it does."""

    def __init__(self, folder: Folder, journal: Journal, leads: bool) -> None:
        self.folder, self.journal, self.leads = folder, journal, leads
        self.next, self.step = 0.0, 0

    def __enter__(self) -> "Curve":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.draw()

    def renew(self, step: int) -> None:
        """At a save."""
        self.step = step
        if time.monotonic() >= self.next:
            self.draw()

    def draw(self) -> None:
        """Draws; a disk that refuses it is no reason to end."""
        if not self.leads:
            return
        from nlscale.train.plot import plot  # matplotlib, which no other rank needs

        began = time.monotonic()
        try:
            plot([self.folder], self.folder.plot)
        except OSError as error:
            self.journal.event("plot failed", self.step, reason=str(error))
        ended = time.monotonic()
        self.next = ended + RARELY * (ended - began)
