"""Where a step's time goes on one rank: named spans, on the host's clock or, on a GPU, between events of its stream.

On a GPU nothing waits for a span: events are read when the step has been waited for anyway.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Mark = float | torch.cuda.Event


class Clock:
    """Spans of one step, by name; a name may have several."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What happens within is this name's."""
        begin = self.mark()
        try:
            yield
        finally:
            self.spans.append((name, begin, self.mark()))

    def mark(self) -> Mark:
        """This moment."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def restart(self) -> None:
        """Forgets all spans."""
        self.spans.clear()

    def seconds(self) -> dict[str, float]:
        """Sum of each name's spans. On a GPU, call when the host has waited for the last of them."""
        found: dict[str, float] = {}
        for name, begin, end in self.spans:
            taken = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000  # type: ignore[operator,arg-type]
            found[name] = found.get(name, 0.0) + taken
        return found


class Timer:
    """One of megatron-core's timers; this one times nothing."""

    def start(self, barrier: bool = False) -> None:
        """Something begins; no rank waits for others."""

    def stop(self, barrier: bool = False) -> None:
        """It ends."""


class Spans(Timer):
    """A timer whose times are spans of a clock."""

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name
        self.begin: Mark = 0.0

    def start(self, barrier: bool = False) -> None:
        """A span begins."""
        self.begin = self.clock.mark()

    def stop(self, barrier: bool = False) -> None:
        """It ends."""
        self.clock.spans.append((self.name, self.begin, self.clock.mark()))


def timers(clock: Clock, **names: str) -> Callable[..., Timer]:
    """megatron-core's `config.timers`; `names`: part of a step -> what its schedules call it. Nothing else is timed."""
    known, untimed = {theirs: Spans(clock, ours) for ours, theirs in names.items()}, Timer()
    return lambda name, log_level=None: known.get(name, untimed)


def parted(seconds: dict[str, float]) -> dict[str, float]:
    """Disjoint parts of a step: forward without its waits for weights; the schedule's rest, which is waiting for stages."""
    gather, forward, backward = (seconds.get(name, 0.0) for name in ("gather", "forward", "backward"))
    schedule = seconds.get("schedule", 0.0) - forward - backward
    first = {"forward": forward - gather, "backward": backward, "gather": gather, "schedule": schedule}
    return first | {name: value for name, value in seconds.items() if name not in first}
