"""`nlscale status` and `nlscale cancel`: what the queue and the run folders say, in one table. Works without either queue
or accounting: then the folder's own record decides."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlscale_launch import slurm
from nlscale_launch.policy import BAD_NODE
from nlscale_launch.script import submitted_jobs

from nlscale.config.errors import FINISHED, SAVED_ON_SIGNAL, STOPPED_ON_PURPOSE, USER_ERROR, UserError
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.goodput import Goodput, account, of_lines
from nlscale.runtime.holder import Hold, Holder

ENDS = {
    FINISHED: "finished",
    SAVED_ON_SIGNAL: "saved",
    USER_ERROR: "config wrong",
    STOPPED_ON_PURPOSE: "stopped",
    BAD_NODE: "bad node",
}
BEAT = 60.0  # seconds in which a holder that lives writes (cluster.lease, by default)
HEAD = ("run", "state", "step", "loss", "tokens/s", "checkpoint", "attempts", "goodput", "what")


@dataclass(frozen=True)
class Row:
    """One run, as the table shows it."""

    run: str
    state: str
    step: int
    loss: float | None
    tokens_per_second: float | None
    checkpoint: int | None  # step of the newest
    attempts: int
    goodput: float | None  # share of the time that machines were held in which steps were made that count
    what: str  # job, its nodes or its reason
    ledger: Goodput | None = None

    def cells(self) -> list[str]:
        """As text."""
        return [
            self.run,
            self.state,
            str(self.step),
            f"{self.loss:.4f}" if self.loss is not None else "-",
            f"{self.tokens_per_second:,.0f}" if self.tokens_per_second is not None else "-",
            str(self.checkpoint) if self.checkpoint is not None else "-",
            str(self.attempts),
            f"{self.goodput:.0%}" if self.goodput is not None else "-",
            self.what,
        ]


def rows(folders: Sequence[Folder]) -> list[Row]:
    """What is known of each run."""
    queue = known_jobs()
    return [row(folder, queue) for folder in folders]


def known_jobs() -> list[slurm.Job] | None:
    """What the queue says; nothing where there is none, None where it does not answer, which is said."""
    try:
        return slurm.jobs() if shutil.which("squeue") else []
    except UserError as error:
        print(f"nlscale: the queue does not answer, so that folders alone decide: {error}", file=sys.stderr)
        return None


def row(folder: Folder, queue: Sequence[slurm.Job] | None) -> Row:
    """What is known of one run."""
    written, events, steps = read_lines(folder.metrics), read_lines(folder.events), folder.steps()
    lines = [line for line in written if "train/loss" in line]
    last, found = lines[-1] if lines else {}, ledger(written, events, folder)
    state, what = standing(folder, events, queue)
    return Row(
        run=folder.path.name,
        state=state,
        step=last.get("step", 0),
        loss=last.get("train/loss"),
        tokens_per_second=last.get("throughput/tokens_per_second"),
        checkpoint=steps[0] if steps else None,
        attempts=sum(event["event"] == "attempt" for event in events),
        goodput=found.share if found else None,
        what=what,
        ledger=found,
    )


def standing(folder: Folder, events: Sequence[dict[str, Any]], queue: Sequence[slurm.Job] | None) -> tuple[str, str]:
    """State and what explains it: the queue's word first, then the holder's, then the record's."""
    numbers = submitted_jobs(folder)
    mine = [job for job in queue or () if any(slurm.same_job(job.number, number) for number in numbers)]
    for job in sorted((job for job in mine if job.active), key=lambda job: job.state != "RUNNING"):
        return job.state.lower(), f"job {job.number} {f'on {job.nodes}' if job.nodes else f'({job.reason})'}"
    if holder := holder_here(folder):
        return "running", f"process {holder.pid} on this host"
    ended = [event for event in events if event["event"] in ("attempt ended", "end", "give up", "submit", "attempt")]
    last = ended[-1] if ended else {"event": "nothing"}
    job = f"job {numbers[-1]}" if numbers else ""
    if last["event"] in ("end", "give up"):
        return ("finished", job) if last["event"] == "end" else ("stopped", last["reason"])
    if last["event"] == "attempt ended" and last["code"] is not None:
        return ENDS.get(last["code"], f"crashed ({last['code']})"), last["reason"] or job
    if last["event"] == "nothing":
        return "new", ""
    if queue is None:
        return ("running" if beating(folder) else "no answer"), f"{job}, by the run folder alone"
    if not numbers and beating(folder):
        return "running", "on another host"
    remembered = [each.state.lower() for each in mine if slurm.same_job(each.number, numbers[-1])]
    return (remembered or [accounted(numbers[-1]) if numbers else "ended"])[0], job


def beating(folder: Folder) -> bool:
    """Whether another host has the run folder, and wrote so of late; of this one, `holder_here` knows better."""
    with contextlib.suppress(OSError):
        hold = Hold(folder.path, 0.0)
        holder = hold.read()
        if holder is not None and not holder.released and holder.host != socket.gethostname():
            return time.time() - hold.file.stat().st_mtime < BEAT
    return False


def accounted(number: str) -> str:
    """What accounting says of a job that the queue has forgotten; `ended` where there is none."""
    if shutil.which("sacct"):
        done = slurm.asked("sacct", "-X", "-n", "-P", "-j", number, "-o", "State")
        if done.returncode == 0 and done.stdout.strip():
            return str(done.stdout.splitlines()[-1].split()[0]).lower()  # CANCELLED by 1000
    return "ended"


def ledger(lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], folder: Folder) -> Goodput | None:
    """Where the time went for which machines were held; None before the first attempt."""
    written = folder.metrics.stat().st_mtime if folder.metrics.is_file() else 0.0
    return account(of_lines(lines), events, written)


def spent(found: Goodput) -> str:
    """The ledger as lines for a person."""
    shares = {name: seconds for name, seconds in vars(found).items() if name != "held"}
    rows = [
        f"{name.replace('_', ' '):12s} {seconds:>12,.0f} s  {seconds / (found.held or 1):>6.1%}"
        for name, seconds in shares.items()
    ]
    return "\n".join([f"machines were held for {found.held:,.0f} s", *rows])


def table(found: Sequence[Row]) -> str:
    """Rows as aligned text."""
    cells = [list(HEAD), *(each.cells() for each in found)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(HEAD))]
    right = range(2, 8)
    return "\n".join(
        "  ".join(
            word.rjust(width) if place in right else word.ljust(width)
            for place, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def cancel(folder: Folder, now: bool) -> str:
    """Ends a run, and says how: what runs is asked to save first, unless `now`; what waits leaves the queue."""
    numbers = submitted_jobs(folder)
    mine = [job for job in (slurm.jobs() if numbers else []) if job.active]
    mine = [job for job in mine if any(slurm.same_job(job.number, number) for number in numbers)]
    said = []
    for job in sorted(mine, key=lambda job: job.state == "RUNNING"):  # what waits first, lest it starts
        gentle = job.state == "RUNNING" and not now
        number = next(each for each in numbers if slurm.same_job(job.number, each))
        number = (
            number if "[" in job.number and "_" in number else job.number
        )  # one run of a sweep, not what else waits
        if gentle:
            try:
                (folder.path / "slurm" / f"cancel-{number}").touch()
            except OSError as error:
                raise UserError(f"cannot write {folder.path}: {error.strerror}; --now would cancel it") from None
        done = slurm.asked("scancel", *(["--signal=USR2"] if gentle else []), number)
        if done.returncode:
            raise UserError(f"scancel {number}: {slurm.first(done.stderr)}")
        said.append(f"job {number} {'saves and ends' if gentle else 'is cancelled'}")
    return "; ".join(said) or cancel_here(folder, now)


def holder_here(folder: Folder) -> Holder | None:
    """The process of this host that has the run folder."""
    with contextlib.suppress(OSError):
        holder = Hold(folder.path, 0.0).read()
        if holder is not None and holder.host == socket.gethostname() and not holder.dead:
            return holder
    return None


def cancel_here(folder: Folder, now: bool) -> str:
    """The same for a run that no queue knows of, on this host."""
    holder = holder_here(folder)
    if holder is None:
        raise UserError(f"{folder.path}: no job of this run is in the queue, and no process of it on this host")
    os.kill(holder.pid, signal.SIGTERM if now else signal.SIGUSR2)
    return f"process {holder.pid} saves and ends"


def every(root: Path) -> list[Folder]:
    """All runs below a folder, the one that was written last first."""
    found = [Folder(path.parent) for path in root.glob("*/config.yaml")]
    return sorted(
        found, key=lambda folder: folder.events.stat().st_mtime if folder.events.is_file() else 0.0, reverse=True
    )
