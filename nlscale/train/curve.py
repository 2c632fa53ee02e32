"""A run's loss curve, which its leading rank draws while every other one waits."""

import time
from types import TracebackType

from nlscale.config.errors import StoppedOnPurpose
from nlscale.runtime.folder import Folder
from nlscale.runtime.holder import Hold
from nlscale.runtime.log import Journal

RARELY = 100  # times as long as a drawing takes lie between one and the next


class Curve:
    """plots/loss.png, renewed at a save unless the last drawing is too young, and when a run ends or is given up.

    What goes on elsewhere, after a signal or a crash, does not wait for it; and whatever fails in it is noted, no more.
    """

    def __init__(self, folder: Folder, journal: Journal, hold: Hold, leads: bool) -> None:
        self.folder, self.journal, self.hold, self.leads = folder, journal, hold, leads
        self.next, self.step = 0.0, 0

    def __enter__(self) -> "Curve":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, StoppedOnPurpose):
            self.draw()

    def renew(self, step: int) -> None:
        """At a save."""
        self.step = step
        if time.monotonic() >= self.next:
            self.draw()

    def draw(self) -> None:
        """Draws, where nobody else writes this folder by now."""
        if not self.leads or self.hold.replaced:
            return
        began = time.monotonic()
        try:
            from nlscale.train.plot import plot  # matplotlib, which no other rank needs

            plot([self.folder], self.folder.plot)
        except Exception as error:
            self.journal.event("plot failed", self.step, reason=f"{type(error).__name__}: {error}")
        ended = time.monotonic()
        self.next = ended + RARELY * (ended - began)
