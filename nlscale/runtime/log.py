"""What a run tells: events for machines, lines for people. A full disk or a closed screen is no reason to end."""

import contextlib
import json
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from nlscale.runtime.folder import Folder, read_lines, write_durably

WAITING = 100_000  # records that a full disk may keep waiting


class Lines:
    """A JSON-lines file. What finds no room waits for the next write, in order; no line is ever half there."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting, self.lock = path, deque[str](maxlen=WAITING), threading.Lock()

    def write(self, record: dict[str, Any]) -> bool:
        """Appends a record, after those that wait; False where the disk refuses."""
        with self.lock:  # a save that goes on beside the run has its own thread
            self.waiting.append(json.dumps(record) + "\n")
            try:
                with self.path.open("ab", buffering=0) as file:
                    self.append(file, "".join(self.waiting).encode())
            except OSError:
                return False
            self.waiting.clear()
            return True

    def forget(self, step: int) -> list[dict[str, Any]]:
        """Drops records of later steps, of the file and of what waits, and gives them.

        Raises OSError where the file cannot be written.
        """
        with self.lock:
            waiting = [(line, json.loads(line)) for line in self.waiting]
            dropped = [record for _, record in waiting if record["step"] > step]
            self.waiting.clear()
            self.waiting.extend(line for line, record in waiting if record["step"] <= step)
            if self.path.is_file():
                there = read_lines(self.path)
                dropped += [line for line in there if line["step"] > step]
                whole = (json.dumps(line) + "\n" for line in there if line["step"] <= step)
                write_durably(self.path, "".join(whole))
            return dropped

    def append(self, file: Any, content: bytes) -> None:
        """All of it or nothing; raises OSError."""
        end, written = file.seek(0, 2), 0
        try:
            while content[written:]:
                written += file.write(content[written:])
        except OSError:
            with contextlib.suppress(OSError):
                if file.seek(0, 2) == end + written:  # nobody else has written since
                    file.truncate(end)
            raise


class Journal:
    """Rank 0 writes events.jsonl and speaks; the other ranks stay silent."""

    def __init__(self, folder: Folder, leads: bool) -> None:
        self.events, self.leads = Lines(folder.events), leads
        attempts = folder.attempts()
        self.log = attempts[-1] / "rank-00000.log" if attempts else None

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """One line of events.jsonl, with host and both clocks."""
        if self.leads:
            record = {"event": kind, "step": step, "host": socket.gethostname(), **facts}
            record |= {"time": time.time(), "monotonic": time.monotonic()}
            self.events.write(record)

    def say(self, line: str) -> None:
        """A line for a person, on the screen and in the log of this start."""
        if self.leads:
            with contextlib.suppress(OSError):
                print(line, flush=True)
            if self.log is not None:
                with contextlib.suppress(OSError), self.log.open("a") as file:
                    if not os.path.sameopenfile(file.fileno(), 1):  # a launcher may have led the screen there
                        file.write(line + "\n")
