"""Whose turn it is, where tests run in several processes (pytest-xdist).

Ranks wait for each other at every collective: two jobs of several ranks beside each other take many times as long. So a job
of several ranks has the machine to itself. A test shares the room with others; who wants it alone lets go of it, takes the
turn, and waits until the room is empty; meanwhile nobody else begins. The locks are of open files, which forks share: a rank
may start ranks, too.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Turns:
    """This process's place in the queue."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.room, self.turn = (os.open(folder / name, os.O_CREAT | os.O_RDWR) for name in ("room", "turn"))

    def enter(self, how: int) -> None:
        """With others (LOCK_SH) or alone (LOCK_EX)."""
        fcntl.flock(self.room, fcntl.LOCK_UN)
        fcntl.flock(self.turn, fcntl.LOCK_EX)
        fcntl.flock(self.room, how)
        fcntl.flock(self.turn, fcntl.LOCK_UN)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A test, which shares the room."""
        self.enter(fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self.room, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What has the machine to itself, within a test."""
        self.enter(fcntl.LOCK_EX)
        try:
            yield
        finally:
            self.enter(fcntl.LOCK_SH)


def here(uid: str) -> Turns:
    """Of a run of tests with this name."""
    return Turns(Path(tempfile.gettempdir(), f"nlscale-turns-{uid}"))


def several_alone(turns: Turns, start: Callable[..., int]) -> Callable[..., int]:
    """`start` of nlscale_launch.local, which waits for its turn where it starts several ranks."""

    def waiting(count: int, *arguments: Any, **more: Any) -> int:
        if count == 1:
            return start(count, *arguments, **more)
        with turns.alone():
            return start(count, *arguments, **more)

    return waiting
