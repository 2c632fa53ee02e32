"""`nlscale submit`: a checked run becomes one readable job script, with what it needs beside it in the run folder."""

import contextlib
import getpass
import json
import platform
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nlscale_launch import slurm
from nlscale_launch.attempt import Submission
from nlscale_launch.preflight import PACKAGES
from nlscale_launch.script import PLAIN, Request, render, submitted_jobs

from nlscale.config.errors import UserError, require
from nlscale.config.read import dump
from nlscale.config.run import Run, replicas
from nlscale.runtime.folder import Folder, read_lines, write_durably
from nlscale.runtime.holder import Hold, Holder
from nlscale.runtime.log import Journal


@dataclass(frozen=True)
class Plan:
    """Everything that is written and submitted."""

    runs: list[Run]  # one; of a sweep, one a task
    request: Request
    number: str  # of this submission in its folder: 0001, ...
    script: str

    @property
    def folder(self) -> Folder:
        """Of the first run, where the script lies."""
        return Folder(Path(self.runs[0].folder).absolute())

    @property
    def sweep(self) -> bool:
        """Whether the array's tasks are runs of their own."""
        return len(self.runs) > 1


def plan(runs: list[Run], request: Request) -> Plan:
    """The job script of runs that were read and resolved; raises UserError for what Slurm could not run."""
    for run in runs:
        replicas(run, request.nodes * run.cluster.ranks)
        folder = str(Path(run.folder).absolute())
        for name, path in (("run.folder", folder), ("this folder", str(Path.cwd()))):
            require(
                PLAIN.fullmatch(path) is not None,
                f"{name}={path} has characters that a job script reads its own way; another path would work",
            )
        check_lead(run, Folder(Path(folder)))
    base = Path(runs[0].folder).absolute() / "slurm"
    number = f"{1 + max((int(path.stem) for path in base.glob('[0-9]*.sbatch')), default=0):04d}"
    return Plan(runs, request, number, render(runs, request, number))


def check_lead(run: Run, folder: Folder) -> None:
    """Raises UserError where the signal would come too late for a save of this run, as its earlier saves took."""
    cluster = run.cluster
    require(
        cluster.lead < cluster.limit,
        f"cluster.lead={cluster.lead} s is no shorter than cluster.time={cluster.time}: the job would do nothing but save",
    )
    events, lines = read_lines(folder.events), read_lines(folder.metrics)
    save = max((event["seconds"] for event in events if event["event"] == "save"), default=0.0)
    sent = max((event.get("seconds", 0.0) for event in events if event["event"] == "upload"), default=0.0)
    steps = [line["throughput/step_seconds"] for line in lines[-100:] if "train/loss" in line]
    evaluation = max((line["eval/seconds"] for line in lines if "eval/seconds" in line), default=0.0)
    need = cluster.least_lead(save + sent, max(steps, default=0.0)) + evaluation
    beside = "".join(
        f", {name} up to {seconds:.0f} s"
        for name, seconds in (("uploads", sent), ("evaluations", evaluation))
        if seconds
    )
    require(
        need <= cluster.lead,
        f"cluster.lead={cluster.lead} s is too short: saves of this run took up to {save:.0f} s{beside}; "
        f"cluster.lead={need:.0f} would work",
    )


def submit(wanted: Plan) -> str:
    """Writes the run folders and submits; gives the job's number. Raises UserError, and has then submitted nothing."""
    check_cluster(wanted)
    for run in wanted.runs:
        refuse_held(run, wanted.request)
    tried = test_only(wanted)
    require(tried[0], f"Slurm refuses the job: {tried[1]}")
    for run in wanted.runs:
        write(run, wanted)
    number = slurm.submitted(str(script_file(wanted)))
    for place, run in enumerate(wanted.runs):
        folder, mine = Folder(Path(run.folder)), f"{number}_{place + 1}" if wanted.sweep else number
        Journal(folder, True).event("submit", folder.newest, job=mine, submission=wanted.number)
    return number


def script_file(wanted: Plan) -> Path:
    """The job script in the run folder."""
    return wanted.folder.path / "slurm" / f"{wanted.number}.sbatch"


def write(run: Run, wanted: Plan) -> None:
    """Config, job script and the facts of this submission; raises UserError where the folder cannot be written."""
    folder, cluster = Folder(Path(run.folder)), run.cluster
    chain = 0 if wanted.sweep else wanted.request.array
    own: dict[str, Any] = {"folder": str(folder.path.absolute()), "steps": run.train.steps, "chain": chain}
    own["least_gpu_memory"] = cluster.gpu_memory
    asked = {field.name: getattr(cluster, field.name) for field in fields(Submission) if field.name not in own}
    facts = Submission(**own, **asked)
    try:
        for name in ("checkpoints", "plots", "logs", "slurm"):
            (folder.path / name).mkdir(parents=True, exist_ok=True)
        base = folder.path / "slurm" / wanted.number
        write_durably(base.with_suffix(".json"), json.dumps(asdict(facts) | code_version(), indent=1) + "\n")
        write_durably(base.with_suffix(".yaml"), dump(replace(run, run=replace(run.run, folder=facts.folder))))
        if not folder.config.is_file():
            write_durably(folder.config, dump(run))
        write_durably(base.with_suffix(".sbatch"), wanted.script)
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder.path}: {error.strerror}") from None


def code_version() -> dict[str, Any]:
    """What computes the run: versions, the commit, and whether the working tree had other changes."""
    found: dict[str, Any] = {"python": platform.python_version(), "packages": {}, "commit": None, "changed": None}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found["packages"][name] = version(name)
    here = ["git", "-C", str(Path(__file__).resolve().parent)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*here, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
        if commit.returncode == 0:
            found |= {"commit": commit.stdout.strip(), "changed": bool(changed.stdout.strip())}
    return found | {"submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "by": getpass.getuser()}


def check_cluster(wanted: Plan) -> None:
    """Raises UserError for a partition that there is not, and for more nodes than it has."""
    known, cluster = slurm.partitions(), wanted.runs[0].cluster
    for name in cluster.partition.split(",") if cluster.partition else []:
        require(name in known, f"cluster.partition={name}: this cluster has {', '.join(sorted(known))}")
    most = (
        max((known[name] for name in cluster.partition.split(",")), default=0)
        if cluster.partition
        else max(known.values(), default=0)
    )
    require(
        wanted.request.nodes <= most,
        f"--nodes {wanted.request.nodes}: {cluster.partition or 'the largest partition'} has {most} nodes",
    )


def test_only(wanted: Plan) -> tuple[bool, str]:
    """Whether Slurm would take the job, and when it would start; writes nothing into the run folder."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        kept = [
            line for line in wanted.script.splitlines() if "--dependency=" not in line
        ]  # which Slurm cannot foresee
        file.write("\n".join(kept) + "\n")
        file.flush()
        done = slurm.asked("sbatch", "--test-only", file.name)
    return done.returncode == 0, slurm.first(done.stderr).removeprefix("sbatch: ")


def refuse_held(run: Run, request: Request) -> None:
    """Raises UserError where another job has the run folder, or waits for it, unless this one comes after it."""
    folder = Folder(Path(run.folder))
    mine = submitted_jobs(folder)
    for job in slurm.jobs() if mine else []:
        known = any(slurm.same_job(job.number, number) for number in mine)
        follows = request.after and slurm.same_job(job.number, request.after.partition("_")[0])
        require(
            not (known and job.active) or bool(follows),
            f"{folder.path} belongs to job {job.number} ({job.state.lower()}); `nlscale cancel {run.run.name}` ends it, "
            f"--after {job.number} comes after it",
        )
    holder = alive(Hold(folder.path, run.cluster.lease))
    if holder and not slurm.is_of(holder.job, request.after):
        raise UserError(f"{folder.path} is held by {holder}, which is alive; wait for it, or give another run.name")


def alive(hold: Hold) -> Holder | None:
    """Who holds a run folder and is known to live: as a job of the queue, as a process of this host, or by its beats."""
    try:
        holder = hold.read()
    except OSError as error:
        raise UserError(f"cannot read {hold.file}: {error.strerror}") from None
    if holder is None or holder.dead:
        return None
    if holder.job:
        state = slurm.facts_of(holder.job).get("JobState", "")
        return holder if state in slurm.ACTIVE else None
    if holder.host == socket.gethostname():
        return holder
    time.sleep(hold.lease / 5)  # a little more than from beat to beat
    now = hold.read()
    return holder if now is not None and now.beat != holder.beat else None


def spread(overrides: Sequence[str], count: int) -> list[list[str]]:
    """Overrides of each task of a sweep: one whose value lists `count` alternatives gives each task its own.

    Without any, the array is a chain, and there is one list. Raises UserError where the number is another.
    """
    found = [list[str]() for _ in range(count)]
    swept = False
    for override in overrides:
        name, _, given = override.partition("=")
        alternatives = given.split(",") if not set(given) & set("[]{}\"'") else [given]
        if len(alternatives) > 1:
            require(
                len(alternatives) == count,
                f"{name.lstrip('-')} has {len(alternatives)} values: --array {len(alternatives)} would work, not {count}",
            )
            require(
                not name.lstrip("-").startswith(("cluster.", "use.", "run.")),
                f"{name.lstrip('-')} cannot differ between the runs of one array; submit them one by one",
            )
            swept = True
        for place, each in enumerate(found):
            each.append(f"{name}={alternatives[place % len(alternatives)]}")
    return found if swept else [list(overrides)]


def named(run: Run, place: int) -> Run:
    """A task's run of a sweep: its name and folder end in its number."""
    folder = f"{run.folder}-{place}"
    return replace(run, run=replace(run.run, name=f"{run.run.name}-{place}", folder=folder))
