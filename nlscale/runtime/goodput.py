"""Where the time goes for which machines were held: a ledger over all attempts of a run, from its own records."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Record = dict[str, Any]


@dataclass
class Steps:
    """Seconds of the steps that stand, summed as their lines are written."""

    productive: float = 0.0
    data_wait: float = 0.0
    evaluation: float = 0.0

    def add(self, line: Record) -> None:
        """Takes a line of metrics.jsonl."""
        waited = line.get("throughput/data_wait_seconds", 0.0)
        self.productive += line.get("throughput/step_seconds", 0.0) - waited
        self.data_wait += waited
        self.evaluation += line.get("eval/seconds", 0.0)


@dataclass(frozen=True)
class Goodput:
    """Seconds. `held` is the sum of all others; `productive` over `held` is goodput."""

    held: float
    productive: float  # steps that stand, but for
    data_wait: float  # what they waited for rows
    recomputed: float  # steps that were lost, and made again
    checkpoint: float  # in which saves held up the run
    evaluation: float
    restart: float  # from an attempt's begin to its first step: programs, groups, the checkpoint
    other: float  # ends of attempts, steps cut short, checks at both ends

    @property
    def share(self) -> float:
        """Goodput, from 0 to 1."""
        return min(1.0, self.productive / self.held) if self.held > 0 else 0.0

    def values(self) -> dict[str, float]:
        """As metrics name them."""
        return {f"goodput/{name}_seconds": round(value, 3) for name, value in asdict(self).items()}


def of_lines(lines: Iterable[Record]) -> Steps:
    """The sums of a whole file."""
    steps = Steps()
    for line in lines:
        steps.add(line)
    return steps


def lost(lines: Iterable[Record]) -> float:
    """Seconds of steps whose lines are dropped, since the run goes on before them."""
    return sum(line.get("throughput/step_seconds", 0.0) for line in lines)


def account(steps: Steps, events: Sequence[Record], until: float) -> Goodput | None:
    """The ledger; None before the first attempt. `until`: seconds since the epoch at which the open attempt was last seen.

    An attempt that said no end lasted until its last record.
    """
    held, restart = 0.0, 0.0
    began: float | None = None  # of the open attempt, its first step's begin, and its last record
    started, latest = False, 0.0

    def close(end: float) -> None:
        nonlocal held, restart, began
        if began is not None:
            held += end - began
            restart += 0.0 if started else end - began  # it never got to a step
            began = None

    for event in events:
        if event["event"] == "attempt":
            close(latest)
            began, started = event["time"], False
        elif event["event"] == "attempt ended":
            close(event["time"] if event["code"] is not None else latest)
        elif event["event"] in ("submit", "give up", "left out"):
            continue  # said while no machine was held
        elif event["event"] == "start" and began is not None and not started:
            restart, started = restart + event["time"] - began, True
        latest = event["time"]
    close(max(latest, until))
    if not any(event["event"] == "attempt" for event in events):
        return None
    recomputed = sum(event["seconds"] for event in events if event["event"] == "again")
    checkpoint = sum(event["stall"] for event in events if event["event"] == "save")
    known = steps.productive + steps.data_wait + steps.evaluation + recomputed + checkpoint + restart
    return Goodput(
        max(held, known),
        steps.productive,
        steps.data_wait,
        recomputed,
        checkpoint,
        steps.evaluation,
        restart,
        max(0.0, held - known),
    )
