"""What follows an attempt: an end, another attempt, or giving up. One function of the attempts so far."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nlscale.config.errors import FINISHED, ORDERLY, STOPPED_ON_PURPOSE, USER_ERROR

BAD_NODE = 69  # exit code: a node did not prove itself; the job may have others
LOST = -1  # of an attempt that never said how it ended


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended."""

    number: int
    code: int
    step: int  # of the newest checkpoint, at its end
    blamed: tuple[str, ...] = ()  # nodes that it broke on

    @property
    def crashed(self) -> bool:
        """Whether it ended for no reason that a run has."""
        if self.code == LOST:  # with a node, or for a reason that Slurm has, such as another job's priority
            return bool(self.blamed)
        return self.code not in (*ORDERLY, BAD_NODE)


@dataclass(frozen=True)
class Verdict:
    """What to do, and why, for a person."""

    what: Literal["end", "again", "give up"]
    code: int
    why: str = ""


def verdict(attempts: Sequence[Attempt], allowed: int) -> Verdict:
    """What follows the last of `attempts` (oldest first): interfaces' table of exit codes, gated by progress.

    `allowed`: crashes in a row with the same newest checkpoint.
    """
    last = attempts[-1]
    if unprovable(attempts, allowed):
        why = f"{', '.join(last.blamed)} did not prove themselves {allowed} times in a row, and Slurm has no others"
        return Verdict("give up", STOPPED_ON_PURPOSE, why)
    if last.code in (FINISHED, USER_ERROR, STOPPED_ON_PURPOSE):
        return Verdict("end", last.code)
    if not last.crashed:
        return Verdict("again", last.code)
    stuck = 0
    for attempt in reversed(attempts):
        if attempt.step != last.step:
            break
        stuck += attempt.crashed
    if stuck >= allowed:
        where = f"the checkpoint of step {last.step}" if last.step else "the first checkpoint"
        return Verdict("give up", STOPPED_ON_PURPOSE, f"{stuck} crashes in a row that did not get beyond {where}")
    return Verdict("again", last.code)


def unprovable(attempts: Sequence[Attempt], allowed: int) -> bool:
    """Whether the last attempts ended before ranks started, each for nodes that were to be left out already."""
    recent, before = attempts[-allowed:], attempts[:-allowed]
    known = {node for attempt in before if attempt.code == BAD_NODE for node in attempt.blamed}
    return len(recent) == allowed and all(
        each.code == BAD_NODE and each.blamed and known >= {*each.blamed} for each in recent
    )


def left_out(attempts: Sequence[Attempt], failures: int) -> list[str]:
    """Nodes that the next attempt does without: those that failed so often, and those that did not prove themselves."""
    counts = Counter(node for attempt in attempts for node in attempt.blamed)
    unproved = {node for attempt in attempts if attempt.code == BAD_NODE for node in attempt.blamed}
    return sorted(unproved | {node for node, count in counts.items() if count >= failures})


def attempts_of(events: Sequence[dict[str, Any]], job: str = "") -> list[Attempt]:
    """The attempts that a run's events tell of; those that said no end are LOST.

    `job`: those of this job, of an array those of all its tasks, whatever else was submitted meanwhile; without it, all
    since the run was last submitted.
    """
    found: dict[int, Attempt] = {}
    base = job.partition("_")[0]
    for event in events:
        if base and str(event.get("job") or "").partition("_")[0] != base:
            continue
        if event["event"] == "submit":
            found.clear()
        elif event["event"] == "attempt":
            found[event["attempt"]] = Attempt(event["attempt"], LOST, event["step"])
        elif event["event"] == "attempt ended":
            code = LOST if event["code"] is None else event["code"]
            found[event["attempt"]] = Attempt(event["attempt"], code, event["step"], tuple(event["blamed"]))
    return list(found.values())


def followed(events: Sequence[dict[str, Any]], number: int, job: str) -> bool:
    """Whether an attempt after this one of `job` may train; one of another job that was refused the folder (78) does not."""
    later = {event["attempt"]: event.get("job") for event in events if event["event"] == "attempt"}
    ended = [event for event in events if event["event"] == "attempt ended" and event["code"] == USER_ERROR]
    refused = {event["attempt"] for event in ended if event.get("job") != job}
    return any(each > number and whose and each not in refused for each, whose in later.items())
