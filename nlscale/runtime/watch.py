"""Signals that ask a run to stop: noted at any moment, heeded at a step's end by all ranks together."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


def heeded() -> list[signal.Signals]:
    """Those that ask this process for an end: a terminal that hangs up does, unless it was told not to mind (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in CAUGHT if not (number == signal.SIGHUP and ignored)]


class Watch:
    """A context in which TERM, INT, USR2 and HUP set `asked` instead of ending the process; HUP not where nohup said so."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict = {}

    def __enter__(self) -> "Watch":
        self._before = {number: signal.signal(number, self._note) for number in heeded()}
        with sparing_children():
            resource_tracker.ensure_running()  # of the rows' shared memory
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name


@contextmanager
def sparing_children() -> Iterator[None]:
    """Processes started within do not hear those signals: Slurm sends them to every process of a job, not to ranks alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
