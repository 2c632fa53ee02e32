"""What a run tells: events for machines, lines for people."""

import json
import socket
import time
from pathlib import Path
from typing import Any


class Journal:
    """Rank 0 writes events.jsonl and speaks; the other ranks stay silent."""

    def __init__(self, events: Path, leads: bool) -> None:
        self.events, self.leads = events, leads

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """One line of events.jsonl, with host and both clocks."""
        if self.leads:
            record = {"event": kind, "step": step, "host": socket.gethostname(), **facts}
            record |= {"time": time.time(), "monotonic": time.monotonic()}
            with self.events.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def say(self, line: str) -> None:
        """A line for a person."""
        if self.leads:
            print(line, flush=True)
