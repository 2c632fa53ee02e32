"""Signals that ask a run to stop: noted at any moment, heeded at a step's end by all ranks together."""

import signal
from types import FrameType, TracebackType

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Watch:
    """A context in which TERM, INT and USR2 set `asked` instead of ending the process."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict = {}

    def __enter__(self) -> "Watch":
        self._before = {number: signal.signal(number, self._note) for number in CAUGHT}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
