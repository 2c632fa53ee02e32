"""The two ends of an attempt, on a job's first node: `begin` before ranks start, `end` when they have ended.

Both write to the run's events.jsonl, which is all that the next attempt knows of this one. Neither imports torch.
"""

import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlscale_launch import slurm
from nlscale_launch.policy import BAD_NODE, Attempt, attempts_of, followed, left_out, verdict

from nlscale.config.errors import FINISHED, ORDERLY, SAVED_ON_SIGNAL, STOPPED_ON_PURPOSE, USER_ERROR, UserError
from nlscale.runtime.folder import Folder, read_json, read_lines
from nlscale.runtime.holder import Hold, Holder
from nlscale.runtime.log import Journal
from nlscale.runtime.outcome import told

PROOF = "preflight.json"
TASK = re.compile(r"error: (?P<node>[^\s:]+): tasks? [\d,\- ]+: (?P<how>.+)")  # srun's words for a rank that ended ...
NODE = re.compile(r"(?:Node failure on|Task launch for .* failed on node) (?P<node>[\w.\-]+)")  # ... and for a node
TOLD = "User defined signal 2"
ORDINARY = re.compile(rf"Exited with exit code|Terminated|Aborted|Out [Oo]f [Mm]emory|{TOLD}")
ENDING = re.compile(r"Terminating StepId|Job step aborted")  # srun ends those that still live
HICCUPS = 20  # lives of a job, beyond which a run folder that cannot be used ends it
TURNS = 3  # back to the queue for other nodes, in a row


@dataclass(frozen=True)
class Submission:
    """What the job script has to know; NNNN.json in the run's slurm folder."""

    folder: str
    steps: int
    gpus: int
    attempts: int
    failures: int
    least_free: float
    least_write: float
    least_gpu_memory: float
    skew: float
    gather: float
    scratch: str
    chain: int = 0  # jobs of a chain of restarts; 0: the job is requeued instead

    @staticmethod
    def read(path: str) -> "Submission":
        """From its file."""
        known = Submission.__dataclass_fields__
        return Submission(**{key: given for key, given in json.loads(Path(path).read_text()).items() if key in known})


def begin(submission: Submission) -> int:
    """Opens an attempt and prints its log folder, port and token for the job script; prints nothing where none is needed."""
    folder, number = Folder(Path(submission.folder)), slurm.this_job()
    if folder.newest >= submission.steps:
        say(f"the run is finished: step {folder.newest} of {submission.steps}")
        return FINISHED
    if cancelled(folder, number):
        say("the job was cancelled: nothing is started")
        return FINISHED
    if holder := holder_elsewhere(folder):
        say(f"the run folder is held by {holder}, which runs: this job leaves it alone")
        return USER_ERROR
    journal, nodes = Journal(folder, True), nodes_of_job()
    conclude_lost(folder, journal)
    events = read_lines(folder.events)
    attempts = attempts_of(events, number)
    if attempts and (judged := verdict(attempts, submission.attempts)).what == "give up":
        return give_up(submission, folder, judged.why)
    if (bad := left_out(attempts, submission.failures)) and set(bad) & set(nodes):
        if back_without(submission, folder, bad, events):
            return FINISHED
        say(f"{', '.join(sorted(set(bad) & set(nodes)))} failed before, and Slurm gives no other: trying all the same")
    logs = folder.open()
    facts: dict[str, Any] = {"attempt": int(logs.name), "job": number, "life": slurm.life(), "nodes": nodes}
    journal.event("attempt", folder.newest, **facts)
    print(logs, free_port(int(os.environ.get("SLURM_JOB_ID") or 0)), secrets.token_hex(16))
    return 0


def holder_elsewhere(folder: Folder) -> Holder | None:
    """Who has the run folder, where that is another job and Slurm says that it runs."""
    holder = Hold(folder.path, 0.0).read()
    if holder is None or holder.dead or holder.job in ("", os.environ.get("SLURM_JOB_ID", "")):
        return None
    return holder if slurm.facts_of(holder.job).get("JobState") in ("RUNNING", "SUSPENDED") else None


def back_without(submission: Submission, folder: Folder, bad: list[str], events: list[dict[str, Any]]) -> bool:
    """Sends the job back to the queue for other nodes; False where it may not be, or was in vain several times."""
    turns = 0
    for event in reversed(events):
        if event["event"] != "left out":
            break
        turns += 1
    if submission.chain or turns >= TURNS:
        return False
    Journal(folder, True).event("left out", folder.newest, nodes=bad)
    say(f"back to the queue without {', '.join(bad)}, which failed before")
    survive()
    return slurm.requeue(slurm.this_job(), bad)


def end(submission: Submission, code: int) -> int:
    """Concludes an attempt after srun ended with `code`; sends the job back to the queue, or gives its exit code."""
    survive()
    folder, logs = Folder(Path(submission.folder)), Path(os.environ["NLSCALE_LOGS"])
    journal, nodes, number = Journal(folder, True), nodes_of_job(), int(logs.name)
    events = read_lines(folder.events)
    code, why, blamed = cause(logs, code, folder.newest >= submission.steps or concluded(events, number))
    if not blamed and code not in ORDERLY:
        blamed = slurm.gone(nodes, began(events, number))
    facts: dict[str, Any] = {"attempt": number, "job": slurm.this_job(), "code": code, "reason": why, "blamed": blamed}
    journal.event("attempt ended", folder.newest, **facts)
    say(f"attempt {number} ended with {code}{f' ({why})' if why else ''}")
    if followed(events, number, slurm.this_job()):
        say("another attempt has followed: this one leaves it alone")
        return code
    earlier = [attempt for attempt in attempts_of(events, slurm.this_job()) if attempt.number < number]
    attempts = [*earlier, Attempt(number, code, folder.newest, tuple(blamed))]
    judged = verdict(attempts, submission.attempts)
    if judged.what == "give up" or (set(blamed) >= set(nodes) and none_good(attempts, len(nodes), submission.attempts)):
        return give_up(submission, folder, judged.why or f"no node proved itself: {why}")
    if judged.what == "end":
        after_chain(submission, judged.code)
        return judged.code
    return again(submission, folder, code, left_out(attempts, submission.failures))


def none_good(attempts: list[Attempt], nodes: int, allowed: int) -> bool:
    """Whether what made every node of the last attempt bad is no matter of nodes: several had it, or one after another."""
    bad = [attempt.code == BAD_NODE for attempt in attempts]
    return bad[-1] and (nodes > 1 or (len(bad) >= allowed and all(bad[-allowed:])))


def give_up(submission: Submission, folder: Folder, why: str) -> int:
    """Says why, and ends for good."""
    Journal(folder, True).event("give up", folder.newest, reason=why)
    say(why)
    after_chain(submission, STOPPED_ON_PURPOSE)
    return STOPPED_ON_PURPOSE


def again(submission: Submission, folder: Folder, code: int, without: list[str]) -> int:
    """Back to the queue, unless somebody has cancelled the job, Slurm has requeued it itself, or a chain goes on."""
    number = slurm.this_job()
    what, life = slurm.standing(number, slurm.LONG)
    if what and life != slurm.life():
        say("Slurm has requeued the job")
    elif what == "over" or cancelled(folder, number):
        say("the job was cancelled: not requeued")
    elif submission.chain:
        last = os.environ.get("SLURM_ARRAY_TASK_ID") == os.environ.get("SLURM_ARRAY_TASK_MAX")
        if without and not last:
            slurm.exclude(os.environ.get("SLURM_ARRAY_JOB_ID", ""), without)
        say("the chain is used up" if last else "the next job of the chain goes on")
    elif what and slurm.requeue(number, without):
        say(f"requeued{f' without {chr(44).join(without)}' if without else ''}")
    else:
        say("Slurm did not requeue it; `nlscale submit` starts it again")
    return code


def cancelled(folder: Folder, number: str) -> bool:
    """Whether `nlscale cancel` was said of this job."""
    return (folder.path / "slurm" / f"cancel-{number}").exists()


def after_chain(submission: Submission, code: int) -> None:
    """What is left of a chain has nothing to do when the run ended for good."""
    if submission.chain and code:
        slurm.asked("scancel", "--state=PENDING", os.environ.get("SLURM_ARRAY_JOB_ID", ""))


def concluded(events: list[dict[str, Any]], attempt: int) -> bool:
    """Whether the run has said that it came to its end, since an attempt began."""
    return any(each["event"] == "end" and each["time"] >= began(events, attempt) for each in events)


def cause(logs: Path, code: int, finished: bool) -> tuple[int, str, list[str]]:
    """The attempt's code, its reason, and the nodes that it broke on; `finished`: the run did what it was to do.

    srun tells the highest code of all ranks, those that it ended itself included, and 0 where it was ended before they
    were; the rank that ended first knows better.
    """
    if code == 0 and finished:
        return 0, "", []
    proof = read_json(logs / PROOF)
    if proof.get("bad"):
        bad: dict[str, list[str]] = proof["bad"]
        return BAD_NODE, "; ".join(f"{node}: {', '.join(faults)}" for node, faults in sorted(bad.items())), sorted(bad)
    said = (logs / "srun.log").read_text() if (logs / "srun.log").is_file() else ""
    print(said, end="", file=sys.stderr)
    spoken = told(logs)
    if spoken.get("code") in ORDERLY:
        return spoken["code"], spoken["message"], []
    if code == 0:
        waited = "Timed out waiting" not in said  # when it is ended, it gives its ranks a while
        return (1, "ranks ended before the run did", []) if waited else (SAVED_ON_SIGNAL, "srun left its ranks", [])
    if code in ORDERLY:
        return code, "", []
    first = ENDING.split(said)[0]  # what came before srun ended the others
    ended = [(found["node"], found["how"].strip()) for found in TASK.finditer(first)]
    if ended and TOLD in ended[0][1]:  # the others lost their peer
        return SAVED_ON_SIGNAL, "a signal came before ranks listened", []
    if spoken.get("hosts"):
        return spoken["code"], f"rank {spoken['rank']} ({spoken['host']}): {spoken['message']}", spoken["hosts"]
    broken = [(found["node"], "failed") for found in NODE.finditer(said)]
    broken += [(node, how) for node, how in ended if not ORDINARY.search(how)]
    if broken:
        return code, f"{broken[0][0]}: {broken[0][1]}", [broken[0][0]]
    if spoken:
        return spoken["code"], f"rank {spoken['rank']} ({spoken['host']}): {spoken['message']}", spoken["hosts"]
    if code - 128 in (signal.SIGUSR2, signal.SIGTERM) and not any("exit code" in how for _, how in ended):
        return SAVED_ON_SIGNAL, "a signal came before ranks listened", []
    return code, f"{ended[0][0]}: {ended[0][1]}" if ended else "", []


def began(events: list[dict[str, Any]], attempt: int) -> float:
    """When an attempt began; seconds since the epoch."""
    return max(
        (each["time"] for each in events if each["event"] == "attempt" and each["attempt"] == attempt), default=0.0
    )


def conclude_lost(folder: Folder, journal: Journal) -> None:
    """An attempt that said no end lost its first node, or was killed outright: its nodes that are gone are to blame."""
    told = [event for event in read_lines(folder.events) if event["event"] in ("attempt", "attempt ended")]
    if not told or told[-1]["event"] != "attempt" or not told[-1]["job"]:
        return
    opened = told[-1]
    blamed = slurm.gone(opened["nodes"], opened["time"])
    facts: dict[str, Any] = {"attempt": opened["attempt"], "job": opened["job"], "code": None, "blamed": blamed}
    journal.event("attempt ended", folder.newest, reason="never said how it ended", **facts)


def nodes_of_job() -> list[str]:
    """Nodes of this job, the first one first, as the job script names them."""
    return [node for node in os.environ.get("NLSCALE_NODES", "").split(",") if node]


def free_port(job: int) -> int:
    """A port of this host, by the job's number, passing over those that are taken."""
    for place in range(100):
        port = 20000 + (job + 977 * place) % 12000  # below those that connections take for themselves
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError("no free port among a hundred on this host")


def survive() -> None:
    """A requeue ends this process: what it has begun takes less than Slurm's patience."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def say(line: str) -> None:
    """A line of the job's output."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """`begin SUBMISSION` or `end SUBMISSION CODE`."""
    code, chain = int(arguments[2]) if arguments[0] == "end" else 1, False
    try:
        submission = Submission.read(arguments[1])
        chain = bool(submission.chain)
        return begin(submission) if arguments[0] == "begin" else end(submission, code)
    except UserError as error:
        print(f"nlscale: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:  # a file system that is away for a moment is no reason to end a run
        say(f"the run folder cannot be used: {error}")
        # srun's 0 may be that of ranks that were ended: a run that is finished says so at its next begin.
        if not chain and code not in (USER_ERROR, STOPPED_ON_PURPOSE) and slurm.life() < HICCUPS:
            survive()
            slurm.requeue(slurm.this_job(), [])
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
