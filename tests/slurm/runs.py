"""Runs on the test cluster: submitted as a person submits them, watched by their folders, held against unbroken ones."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nlscale.config.read import read
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests import records
from tests.corpus import LEVELS, MODEL, REST, TRAIN, small_run
from tests.slurm.cluster import Cluster

PROGRAM = [sys.executable, "-m", "nlscale.cli"]


@dataclass
class Submitted:
    """A run, its job, and what it was asked for."""

    slurm: Cluster
    folder: Path
    overrides: list[str]
    job: str

    @cached_property
    def run(self) -> Any:
        return read("demo", self.overrides)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return records.events(self.run, kind)

    def step(self) -> int:
        lines = records.lines(self.run)
        return lines[-1]["step"] if lines else 0

    def until(self, what: Callable[[], Any], why: str, seconds: float = 180) -> Any:
        try:
            return self.slurm.wait(what, why, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def at_step(self, step: int) -> int:
        """Waits until it has made so many steps."""
        return self.until(lambda: self.step() >= step and self.step(), f"step {step}")

    def ended(self, seconds: float = 240) -> dict[str, str]:
        """The job's facts once it is over."""
        try:
            return self.slurm.ended(self.job, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def told(self) -> str:
        """Everything that it said, for a person who looks for a fault."""
        files = [*(self.folder / "slurm").glob("*.out"), *sorted((self.folder / "logs").glob("*/*.log"))]
        said = [f"== {path}\n{path.read_text()[-4000:]}" for path in files]
        return "\n".join([*said, (self.folder / "events.jsonl").read_text()])

    def out(self) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / "slurm").glob("*.out")))

    def codes(self) -> list[int | None]:
        """Of the attempts so far."""
        return [event["code"] for event in self.events("attempt ended")]

    def again_after(self, moment: float) -> float:
        """Seconds from a moment to the first step that was made by the next attempt."""
        began = next(event["time"] for event in self.events("start") if event["time"] > moment)
        return began - moment


def submit(slurm: Cluster, folder: Path, data: str, *overrides: str, nodes: int = 2, **more: Any) -> Submitted:
    """Thirty steps of the small run, unless overridden."""
    fixed = [LEVELS, *MODEL, *TRAIN, *REST, f"data.path={data}", f"run.folder={folder}", f"run.name={folder.name}"]
    fixed += ["cluster.threads=1", "checkpoint.interval=10", f"cluster.scratch={slurm.dir}/local", *overrides]
    more.setdefault("stderr", subprocess.PIPE)
    options = ["--cluster", "cpu", "--nodes", str(nodes), *more.pop("options", [])]
    done = slurm.tried(*PROGRAM, "submit", "demo", *fixed, *options, **more)
    assert done.returncode == 0, done.stderr
    return Submitted(slurm, folder, fixed, done.stdout.split()[1])


def unbroken(data: str, folder: Path, count: int, *overrides: str) -> Any:
    """The same run on forked ranks of this machine, never interrupted."""
    run = small_run(data, folder, "cluster.threads=1", "checkpoint.interval=10", *overrides)
    ranks(count, train, run)
    return run


def equal(one: Any, other: Any, step: int = 30) -> bool:
    """Whether two runs have the same bits at a step: every loss, token hash, master weight, moment and window."""
    same = records.shards(one, step) == records.shards(other, step)
    for series in (records.losses, records.hashes):
        mine, theirs = (series(run)[:step] for run in (one, other))
        same = same and mine == theirs and len(mine) == step
    return same


def interpreter(folder: Path, name: str) -> str:
    """One of the scripts beside this file, for `cluster.python`."""
    path = folder / name.removesuffix(".py")
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name(name)} "$@"\n')
    path.chmod(0o755)
    return str(path)
