"""What a run tells: events for machines, lines for people."""

import json
import socket
import time
from typing import Any

from nlscale.runtime.folder import Folder


class Journal:
    """Rank 0 writes events.jsonl and speaks; the other ranks stay silent."""

    def __init__(self, folder: Folder, leads: bool) -> None:
        self.events, self.leads = folder.events, leads
        attempts = folder.attempts()
        self.log = attempts[-1] / "rank-00000.log" if attempts else None

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """One line of events.jsonl, with host and both clocks."""
        if self.leads:
            record = {"event": kind, "step": step, "host": socket.gethostname(), **facts}
            record |= {"time": time.time(), "monotonic": time.monotonic()}
            with self.events.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def say(self, line: str) -> None:
        """A line for a person, on the screen and in the log of this start."""
        if self.leads:
            print(line, flush=True)
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(line + "\n")
