"""The job script: `slurm.sbatch` with a run's and a cluster's facts filled in."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from nlscale_launch import slurm

from nlscale.config.run import Run
from nlscale.runtime.folder import Folder, read_lines

TEMPLATE = Path(__file__).with_name("slurm.sbatch")
PLAIN = re.compile(r"[\w./+=,@~-]+")  # a path that Slurm and shells read as it is


@dataclass(frozen=True)
class Request:
    """What was asked for beside the run."""

    nodes: int
    array: int = 0  # jobs of a chain or a sweep; 0: one job
    after: str = ""  # a job that must end first


def render(runs: list[Run], request: Request, number: str) -> str:
    """The job script."""
    run, cluster, folder = runs[0], runs[0].cluster, str(Path(runs[0].folder).absolute())
    sweep = len(runs) > 1
    place = folder.removesuffix("-1") + "-%a" if sweep else folder
    files = (folder.removesuffix("-1") + '-"$SLURM_ARRAY_TASK_ID"' if sweep else folder) + f"/slurm/{number}"
    words = {
        "NAME": re.sub(r"[^\w.-]", "-", run.run.name, flags=re.ASCII),
        "OUTPUT": f"{place}/slurm/{'%A_%a' if request.array else '%j'}.out",
        "NODES": str(request.nodes),
        "TASKS": str(cluster.ranks),
        "TIME": limit(cluster.limit),
        "LEAD": str(cluster.lead),
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in options(run, request, sweep)),
        "ENVIRONMENT": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment(run).items()),
        "SETUP": "\n".join(cluster.setup),
        "SUBMISSION": f"{files}.json",
        "CONFIG": f"{files}.yaml",
        "HERE": shlex.quote(sys.executable),
        "PYTHON": shlex.quote(cluster.python or sys.executable),
        "STEP": " ".join(map(shlex.quote, step(run))),
        "RANKS": shlex.quote(f"--cpu-bind={cluster.bind}") if cluster.bind else "",
    }
    script = TEMPLATE.read_text()
    for name, word in words.items():
        script = script.replace(f"@{name}@", word)
    tidy = [" ".join(line.split()) if line.startswith("srun") else line.rstrip() for line in script.splitlines()]
    return "\n".join(line for place, line in enumerate(tidy) if line or tidy[place - 1]) + "\n"


def limit(seconds: int) -> str:
    """Seconds as Slurm writes them."""
    days, rest = divmod(seconds, 86400)
    return f"{days}-{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def options(run: Run, request: Request, sweep: bool) -> list[str]:
    """Of sbatch, beside those that every job has."""
    cluster = run.cluster
    found = [f"--chdir={Path.cwd()}"]
    for name, given in (
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.quality),
        ("constraint", cluster.constraint),
        ("gpus-per-node", cluster.gpus or ""),
        ("cpus-per-task", cluster.cores or ""),
        ("mem", cluster.memory),
        ("dependency", dependency(run, request)),
    ):
        found += [f"--{name}={given}"] if given else []
    found += ["--exclusive"] if cluster.exclusive else []
    found += ["--kill-on-invalid-dep=yes"] if request.after else []
    found += [f"--array=1-{request.array}{'' if sweep else '%1'}"] if request.array else []
    return found + cluster.options


def dependency(run: Run, request: Request) -> str:
    """After a job of the same run whatever became of it, after any other job if it went well."""
    if not request.after:
        return ""
    mine = any(slurm.same_job(request.after, number) for number in submitted_jobs(Folder(Path(run.folder))))
    return f"{'afterany' if mine else 'afterok'}:{request.after}"


def environment(run: Run) -> dict[str, str]:
    """Variables of the job, the cluster's own last."""
    cluster, found = run.cluster, {"PYTHONUNBUFFERED": "1"}
    if cluster.cores:
        found["SRUN_CPUS_PER_TASK"] = str(cluster.cores)
    if cluster.scratch:
        found["TMPDIR"] = cluster.scratch
    return found | cluster.environment


def step(run: Run) -> list[str]:
    """Options of every srun of the job."""
    cluster = run.cluster
    found = [f"--container-image={cluster.container}"] if cluster.container else []
    found += [f"--container-workdir={Path.cwd()}"] if cluster.container else []
    return found + ([f"--container-mounts={','.join(cluster.mounts)}"] if cluster.mounts else [])


def submitted_jobs(folder: Folder) -> list[str]:
    """Numbers of all jobs of a run: submitted ones, and any that began without a note of its submission."""
    said = [event for event in read_lines(folder.events) if event["event"] in ("submit", "attempt")]
    return list(dict.fromkeys(event["job"] for event in said if event.get("job")))
