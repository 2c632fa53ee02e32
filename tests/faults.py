"""Faults for real: a rank that kills itself at the k-th time it touches the disk, and bytes that flip."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlscale.config.run import Run
from nlscale.runtime.folder import Folder
from nlscale.train import loop

TOUCHES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


class Boundaries:
    """Counts what this process does to files below a folder, and kills it at the k-th: before it happens.

    Opening a file to write, fsync (before and after), renaming, removing, making and removing folders.
    """

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.seen, self.on = str(folder), at, 0, False
        sys.addaudithook(self.heard)
        plain = os.fsync

        def fsync(descriptor: Any) -> None:
            self.touched()
            plain(descriptor)
            self.touched()

        os.fsync = fsync

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or (event != "open" and event not in TOUCHES):
            return
        if not isinstance(arguments[0], str | os.PathLike) or not str(arguments[0]).startswith(self.folder):
            return
        writes = event != "open" or (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        if writes:
            self.touched()

    def touched(self) -> None:
        if self.on:
            self.seen += 1
            if self.seen == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def train_until_touch(run: Run, rank: int, at: int, after: int) -> int:
    """Trains; from step `after` on, `rank` counts its touches of checkpoints and dies at number `at`. Gives the count.

    The save before has come to its end by then: what it writes beside the run is in no count, or in all.
    """
    mine, folder = int(os.environ["RANK"]) == rank, Folder(Path(run.folder))
    boundaries = Boundaries(folder.path / "checkpoints", at if mine else 0)
    plain = loop.train_step

    def step(state: Any, *rest: Any) -> Any:
        if state.step + 1 == after and after > run.checkpoint.interval:
            while not folder.steps() or not (folder.path / "checkpoints" / "latest").exists():
                time.sleep(0.05)
            time.sleep(0.3)
        boundaries.on = mine and state.step + 1 >= after
        return plain(state, *rest)

    loop.train_step = step
    loop.train(run)
    return boundaries.seen


def flip(path: Path, random_place: random.Random) -> str:
    """Flips one bit somewhere in a file; says where."""
    content = bytearray(path.read_bytes())
    place, bit = random_place.randrange(len(content)), random_place.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))
    return f"{path.name}: byte {place}, bit {bit}"


def attempt(run: Callable[[], Any]) -> bool:
    """Whether ranks came to their end."""
    try:
        run()
    except RuntimeError:
        return False
    return True
