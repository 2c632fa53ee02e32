"""A real Slurm cluster on this machine: four nodes in namespaces, brought up in about a second, gone with this process."""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent / "machine"
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE"}
ACTIVE = "pending,running,suspended,completing,configuring"


def missing() -> str:
    """Why no cluster can be brought up here; empty where one can."""
    for tool in TOOLS:
        if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            return f"{tool} is not installed"
    if os.geteuid():
        return "it takes root"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "x", "type", "veth"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class Cluster:
    def __init__(self, nodes: int = 4, **knobs: Any) -> None:
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="slt.", dir="/tmp"))
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        read, self.lifeline = os.pipe()  # the cluster ends when this process does, however it ends
        environment = os.environ | {"LIFELINE": str(read), "NODES": str(nodes)} | {k: str(v) for k, v in knobs.items()}
        began = time.monotonic()
        up = subprocess.run(
            ["bash", str(HERE / "up.sh"), str(self.dir)],
            pass_fds=[read],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
        )
        os.close(read)
        if up.returncode:
            os.close(self.lifeline)
            raise RuntimeError(up.stdout)
        self.up_seconds = time.monotonic() - began
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.env["PATH"] = f"{self.dir}/bin:{self.env['PATH']}"

    def down(self) -> None:
        subprocess.run(["bash", str(HERE / "down.sh"), str(self.dir)], check=True, timeout=60)
        os.close(self.lifeline)

    def tried(self, *command: Any, **options: Any) -> subprocess.CompletedProcess:
        """A command as typed on the login node."""
        settings: dict[str, Any] = {"env": self.env, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL}
        settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        return subprocess.run([str(word) for word in command], **settings)

    def said(self, *command: Any, **options: Any) -> str:
        """What a command says that must succeed."""
        done = self.tried(*command, **options)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.returncode}: {done.stdout}")
        return done.stdout.strip()

    def node(self, what: str, name: str, *command: Any) -> str:
        return self.said("bash", HERE / "node.sh", self.dir, what, name, *command)

    def controller(self, what: str) -> str:
        return self.said("bash", HERE / "ctl.sh", self.dir, what)

    def job(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` says; of an ended job, too."""
        line = self.said("scontrol", "show", "job", "-o", job).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def jobs(self) -> list[dict[str, Any]]:
        return json.loads(self.said("squeue", "--json", "--states=all"))["jobs"]

    def wait(self, what: Callable[[], Any], why: str, seconds: float = 90) -> Any:
        """The first true value; fails with `why`."""
        until = time.monotonic() + seconds
        while not (value := what()):
            if time.monotonic() > until:
                raise TimeoutError(f"{why}: not in {seconds:g} s")
            time.sleep(0.2)
        return value

    def ended(self, job: int | str, seconds: float = 90) -> dict[str, str]:
        """The job's facts once it is over."""

        def over() -> dict[str, str] | None:
            facts = self.job(job)
            return facts if facts["JobState"] in ENDED else None

        return self.wait(over, f"job {job} over", seconds)

    def states(self) -> dict[str, str]:
        """Of the nodes."""
        return dict(line.split() for line in self.said("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines())

    def idle(self) -> None:
        self.wait(lambda: set(self.states().values()) == {"idle"}, "every node idle", 60)

    def reset(self) -> None:
        """No job left, every node idle."""
        left = set(self.said("squeue", "-h", "-o", "%A", "-t", ACTIVE).split())
        if left:
            self.tried("scancel", "--full", "-s", "KILL", *left)
            self.tried("scancel", *left)
        for name, state in self.states().items():
            if state.rstrip("*") in ("down", "drained", "draining"):
                self.tried("scontrol", "update", f"nodename={name}", "state=resume")
        self.idle()
