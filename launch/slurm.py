"""What is asked of Slurm, and what it answers. No command is built by a shell."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nlscale.config.errors import UserError, require

PATIENCE = 60.0  # seconds in which a controller that restarts is back ...
LONG = 900.0  # ... and for which a job that has ended its attempt waits to be requeued
SUBMITTING = 300.0  # seconds for sbatch: a job that a slow controller takes later would be known to nobody
REFUSED = ("Invalid job id", "ermission denied", "not permitted", "disabled", "already completing", "already finished")
PLACES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
)  # torchrun's words to a rank
ACTIVE = {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT"}


@dataclass(frozen=True)
class Job:
    """One job of the queue; of an array, one task."""

    number: str  # as scontrol and scancel take it: 12, 12_3, or 12_[4-9] for tasks that are still to come
    state: str
    reason: str
    nodes: str

    @property
    def active(self) -> bool:
        """Whether it runs or will."""
        return self.state in ACTIVE


def asked(
    *command: str, seconds: float = 30.0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs a command of Slurm; raises UserError where there is none."""
    require(
        shutil.which(command[0]) is not None,
        f"no {command[0]} on the path: this is not a node from which jobs are submitted; `nlscale train` trains here",
    )
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, env=environment
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} did not answer within {seconds:g} s")


def patient(*command: str, seconds: float | None = None) -> str:
    """What a command says once it succeeds; empty where it does not in so many seconds (unset: PATIENCE)."""
    until = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while time.monotonic() < until:
        done = asked(*command)
        if done.returncode == 0:
            return str(done.stdout)
        if "Invalid job id" in done.stderr:
            return ""
        time.sleep(1.0)
    return ""


def jobs() -> list[Job]:
    """This user's jobs: those in the queue, and ended ones while Slurm remembers them. Raises UserError."""
    done = asked("squeue", "--json", "--states=all", f"--user={os.getuid()}")
    require(done.returncode == 0, f"squeue: {first(done.stderr)}")
    return [job(record) for record in json.loads(done.stdout)["jobs"]]


def job(record: dict) -> Job:
    """A record of squeue's JSON: of 22.05, or of later versions, whose states are lists and whose numbers may be unset."""
    state = record["job_state"]
    base, task = value(record.get("array_job_id")), value(record.get("array_task_id"))
    number = str(value(record["job_id"]))
    if base:
        tasks = record.get("array_task_string") or task
        number = f"{base}_{task if task is not None else f'[{tasks}]'}"
    states = state if isinstance(state, list) else [state]
    return Job(
        number=number,
        state=str("COMPLETING" if "COMPLETING" in states else states[0]),
        reason=str(record.get("state_reason") or ""),
        nodes=str(record.get("nodes") or ""),
    )


def value(number: object) -> int | None:
    """A number of Slurm's JSON, plain or with a mark that says whether it is one."""
    if isinstance(number, dict):
        return int(number["number"]) if number.get("set") and not number.get("infinite") else None
    return int(number) if isinstance(number, int) else None


def same_job(number: str, wanted: str) -> bool:
    """Whether a job's number is `wanted`, a task of it, or stands for tasks of which it is one (12_[2-4%1])."""
    base, _, task = wanted.partition("_")
    mine, _, tasks = number.partition("_")
    if base != mine or not task:
        return base == mine
    spans = [span.partition("-") for span in tasks.strip("[]").partition("%")[0].split(",") if span]
    return any(int(first) <= int(task) <= int(last or first) for first, _, last in spans)


def is_of(number: str, wanted: str) -> bool:
    """Whether the job that a process finds in its SLURM_JOB_ID is `wanted`, or a task of that array."""
    base = wanted.partition("_")[0]
    return bool(number and base) and base in (number, facts_of(number).get("ArrayJobId"))


def facts_of(number: str, seconds: float | None = None) -> dict[str, str]:
    """What `scontrol show job` says; empty where Slurm does not answer."""
    line = patient("scontrol", "show", "job", "-o", number, seconds=seconds)
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def standing(number: str, seconds: float | None = None) -> tuple[str, int]:
    """What becomes of a job, and how often it was restarted.

    `goes on`, `time limit`, `over` (somebody ended it; Slurm shows nothing but COMPLETING while a step of it lives), or
    empty where Slurm does not say.
    """
    facts = facts_of(number, seconds)
    state, restarts = facts.get("JobState", ""), int(facts.get("Restarts", "0"))
    if state == "TIMEOUT" or facts.get("Reason") == "TimeLimit":
        return "time limit", restarts
    return ("goes on" if state in ("RUNNING", "PENDING") else "over" if state else ""), restarts


def this_job() -> str:
    """Number of the job that this process belongs to; of an array, of its task."""
    base, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{base}_{task}" if base and task else os.environ.get("SLURM_JOB_ID", "")


def life() -> int:
    """How often this job had been restarted when this process began."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def requeue(number: str, without: Sequence[str]) -> bool:
    """Sends a job back to the queue, leaving nodes out of what it may get; whether Slurm did.

    The caller is of that job: Slurm ends it soon. A job that was requeued cannot start again at once, so that the second
    command comes in time; where it does not, the next attempt finds the node and tries again.
    """
    done = patient_requeue(number)
    if done and without:
        exclude(number, without)
    return done


def exclude(number: str, without: Sequence[str]) -> bool:
    """Has a job that waits do without nodes, besides those that it does without already; whether Slurm agreed.

    As many nodes as it needs are left to it: those that were left out first come back.
    """
    facts = facts_of(number)
    excluded = facts.get("ExcNodeList", "(null)")
    before = [] if excluded == "(null)" else patient("scontrol", "show", "hostnames", excluded).split()
    wanted = list(dict.fromkeys([*before, *without]))
    wanted = wanted[max(0, len(wanted) - spare(facts)) :]
    for _ in range(20):
        if asked("scontrol", "update", f"jobid={number}", f"ExcNodeList={','.join(wanted)}").returncode == 0:
            return True
        time.sleep(0.2)
    return False


def spare(facts: dict[str, str]) -> int:
    """Nodes of a job's partitions that it can do without; many where Slurm does not say."""
    try:
        known, need = partitions(), int(facts["NumNodes"].partition("-")[0])
        return max(0, max(known[name] for name in facts["Partition"].split(",")) - need)
    except (UserError, KeyError, ValueError):
        return 1_000_000


def patient_requeue(number: str) -> bool:
    """`scontrol requeue`, over a restart of the controller; never of a life that has followed meanwhile."""
    until, mine = time.monotonic() + LONG, life()
    while time.monotonic() < until:
        what, restarts = standing(number)
        if what and restarts != mine:
            return False
        done = asked("scontrol", "requeue", number)
        if done.returncode == 0:
            return True
        if any(word in done.stderr for word in REFUSED):
            return False
        time.sleep(1.0)
    return False


def gone(nodes: Sequence[str], since: float) -> list[str]:
    """Nodes that Slurm has given up, or that were started again after `since`."""
    lost = []
    for line in patient("scontrol", "show", "node", "-o", ",".join(nodes)).splitlines() if nodes else []:
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        state = facts.get("State", "")
        flags = set(re.split(r"[^A-Z_]+", state))
        saved = any(flag.startswith("POWER") for flag in flags)  # an idle node of a cloud
        away = not saved and bool(flags & {"DOWN", "FAIL", "ERROR", "NOT_RESPONDING"} or "*" in state)
        if away or seconds(facts.get("BootTime", "")) > since:
            lost.append(facts["NodeName"])
    return lost


def seconds(moment: str) -> float:
    """A time of Slurm as seconds since the epoch; 0 where it is none."""
    try:
        return time.mktime(time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0


def partitions() -> dict[str, int]:
    """Nodes of each partition; raises UserError."""
    done = asked("sinfo", "--all", "--noheader", "--format=%R|%D")
    require(done.returncode == 0, f"sinfo: {first(done.stderr)}")
    found: dict[str, int] = {}
    for line in done.stdout.split():
        name, count = line.split("|")
        found[name] = found.get(name, 0) + int(count)
    return found


def first(said: str) -> str:
    """What Slurm complains of, in a line."""
    if "Could not establish a configuration source" in said:
        return "Slurm's programs are here, and no configuration of a cluster; SLURM_CONF would name its file"
    lines = [line.partition("error: ")[2] or line for line in said.strip().splitlines()]
    return "; ".join(dict.fromkeys(lines)) or "no reason given"


def outside() -> dict[str, str]:
    """This environment without what a job or a launcher told its processes: sbatch hands on all that it finds.

    Who submits from inside a job would otherwise pass its number, its restarts and its rank to the new one.
    """
    kept = ("SLURM_CONF", "SLURM_TIME_FORMAT")
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not (name.startswith(("SLURM_", "TORCHELASTIC_")) or name in PLACES)
    }


def submitted(script: str) -> str:
    """The number of the job that a script became; raises UserError with Slurm's reason."""
    done = asked("sbatch", "--parsable", script, seconds=SUBMITTING, environment=outside())
    if done.returncode == 124:
        raise UserError(f"{first(done.stderr)}; Slurm may take the job yet: `squeue --me` tells, before another try")
    if done.returncode:
        raise UserError(f"Slurm refuses the job: {first(done.stderr)}")
    return str(done.stdout.splitlines()[-1].split(";")[0])
