"""A watchdog: a job in which nothing goes on says where every rank stands, names who is missing, and ends.

Each rank has a thread that looks whether its run goes on, and that writes a sign of life every few seconds into a folder of
the run. When nothing went on for the configured time, it writes the Python stacks of its rank into the rank's log; then the
lowest rank that still lives names the cause and all end. A rank that is stopped gives no sign.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from nlscale.runtime.outcome import here

HUNG = 70  # exit code: a crash, which may be requeued
EARLIER = 300.0  # seconds by which other ranks may begin before this one, and clocks differ
SIGNS = 4  # signs of life of one rank within which every other gives one


class Watchdog:
    """A context; `note` says that something went on."""

    def __init__(
        self, alive: Path, rank: int, ranks: int, seconds: float, ended: Callable[[str, list[str]], None]
    ) -> None:
        """`alive`: the folder of the signs of life. `seconds`: without progress; 0 watches nothing.

        `ended` is told the cause and the hosts of missing ranks, on the one rank that speaks, before its process ends.
        """
        self.alive, self.rank, self.ranks, self.seconds, self.ended = alive, rank, ranks, seconds, ended
        self.pause = min(seconds / 8, 5.0)
        self.last, self.what, self.begun = time.monotonic(), "start", 0.0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self.alive.mkdir(parents=True, exist_ok=True)
            self.last, self.begun = time.monotonic(), time.time()
            self.sign(0)  # a rank that stops before its thread's first sign is known, too
            self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()

    def note(self, what: str) -> None:
        """Something went on; `what` is named where nothing follows."""
        self.last, self.what = time.monotonic(), what

    def watch(self) -> None:
        """The thread."""
        beats = 0
        while not self.over.wait(self.pause):
            beats += 1
            self.sign(beats)
            if time.monotonic() - self.last > self.seconds:
                self.bite()

    def sign(self, beats: int) -> None:
        """A sign of life: a file that others see change."""
        partial = self.place(self.rank).with_suffix(".partial")
        with contextlib.suppress(OSError):  # a full disk
            partial.write_text(json.dumps({"host": here(), "beats": beats, "after": self.what}))
            partial.replace(self.place(self.rank))

    def place(self, rank: int) -> Path:
        """Where a rank's sign stands."""
        return self.alive / f"rank-{rank:05d}.json"

    def bite(self) -> None:
        """Stacks, the cause, the end of this process."""
        print(f"nothing went on for {self.seconds:g} s after {self.what}; the stacks of this rank:", file=sys.stderr)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        self.record()
        before = self.signs()
        for beats in range(SIGNS):  # long enough for every thread that lives to give one
            self.sign(-1 - beats)
            time.sleep(self.pause)
        missing = [rank for rank, sign in self.signs().items() if sign is None or sign == before[rank]]
        missing = [rank for rank in missing if rank != self.rank]
        if self.rank == min(set(range(self.ranks)) - set(missing)):
            self.ended(self.cause(missing), self.hosts(missing))
        os._exit(HUNG)

    def record(self) -> None:
        """NCCL's flight recorder, where this rank computes on a GPU: its last collectives, for torch's `torchfrtrace`."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if torch.cuda.is_available() and dump is not None:
            with contextlib.suppress(Exception):  # the last words of a process that hangs
                self.place(self.rank).with_name(f"nccl-{self.rank:05d}").write_bytes(dump())

    def signs(self) -> dict[int, str | None]:
        """What every rank last wrote; None where it has written nothing since this attempt began."""
        since, found = self.begun - EARLIER, dict[int, str | None]()
        for rank in range(self.ranks):
            path = self.place(rank)
            found[rank] = path.read_text() if path.is_file() and path.stat().st_mtime >= since else None
        return found

    def hosts(self, missing: list[int]) -> list[str]:
        """Where those ranks were last heard of."""
        said = [sign for rank, sign in self.signs().items() if rank in missing and sign]
        return sorted({json.loads(sign)["host"] for sign in said})

    def cause(self, missing: list[int]) -> str:
        """What a person is told."""
        said = f"nothing went on for {self.seconds:g} s after {self.what}"
        if not missing:
            return f"{said}; every rank lives and waits: the stacks in their logs say for what"
        signs = self.signs()
        names = []
        for rank in missing:
            sign = signs.get(rank)
            where = (
                f"host {json.loads(sign)['host']}, last after {json.loads(sign)['after']}" if sign else "never heard of"
            )
            names.append(f"rank {rank} ({where})")
        return f"{said}; no sign of life from {', '.join(names)}"
