"""The job script against golden text; and what is refused, in a line, with 78, before anything is submitted."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nlscale_launch.script import Request
from nlscale_launch.slurm import same_job
from nlscale_launch.submit import alive, named, plan, spread

from nlscale.config.read import read, shipped
from nlscale.runtime.folder import Folder
from nlscale.runtime.holder import Hold, this_process
from nlscale.runtime.log import Journal
from tests.corpus import LEVELS, MODEL, REST, TRAIN
from tests.slurm.cluster import Cluster
from tests.slurm.runs import PROGRAM

GOLDEN = Path(__file__).parents[1] / "golden" / "sbatch"
BATCH = ["train.global_batch=64", "train.micro_batch=1", "parallel.tensor=2"]
CASES: dict[str, tuple[list[str], Request]] = {
    "cpu": ([], Request(2)),
    "gpu": (["cluster.partition=train", "cluster.account=lab"], Request(4)),
    "h100-infiniband": (["cluster.time=2-12"], Request(4, array=3)),
    "h100-efa": (
        ["cluster.container=nvcr.io#nvidia/pytorch:26.01-py3", "cluster.python=python3", "cluster.mounts=[/fsx:/fsx]"],
        Request(4, after="17"),
    ),
    "sweep": (["cluster.setup=[module load cuda/12.8]"], Request(1, array=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_script_is_golden(
    case: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, wanted = CASES[case]
    cluster = "gpu" if case == "sweep" else case
    run = read("demo", [f"use.cluster={cluster}", *BATCH, "run.name=a run", "run.folder=runs/a", *overrides])
    runs = [named(run, 1), named(run, 2)] if case == "sweep" else [run]
    script = plan(runs, wanted).script.replace(sys.executable, "PYTHON").replace(str(tmp_path), "/home/lab")
    path = GOLDEN / f"{case}.sbatch"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
    assert script == path.read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert not re.search("@[A-Z]+@", script)


def test_every_shipped_cluster_is_among_the_golden_scripts() -> None:
    assert set(shipped("cluster")) <= CASES.keys()


def overrides(data: str, folder: Path) -> list[str]:
    return [LEVELS, *MODEL, *TRAIN, *REST, f"data.path={data}", f"run.folder={folder}", "run.name=x"]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment without Slurm."""
    (tmp_path / "bin").mkdir()
    for name in ("git", "sh"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    yield os.environ | {"PATH": f"{tmp_path}/bin"}


def refused(words: list[str], environment: dict[str, str], folder: Path) -> str:
    """The one line that a submission ends with."""
    done = subprocess.run([*PROGRAM, "submit", "demo", *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 78 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(folder.rglob("*.sbatch")), done.stderr
    return done.stderr


MISTAKES: dict[str, tuple[list[str], str]] = {
    "a typo": (["optim.lrr=1"], "Did you mean: 'lr'"),
    "an unknown cluster": (["--cluster", "h200"], "choose from cpu, gpu, h100-efa, h100-infiniband"),
    "an impossible layout": (["parallel.tensor=8"], "cannot be split over parallel.tensor=8"),
    "ranks and batch": (["--nodes", "16"], "is no multiple of 32 replicas"),
    "no node": (["--nodes", "0"], "--nodes 0 must be at least 1"),
    "a lead that is longer than the job": (
        ["cluster.time=0:30"],
        "cluster.lead=60 s is no shorter than cluster.time=0:30",
    ),
    "a time that is none": (["cluster.time=soon"], "must be seconds, hours:minutes:seconds or days-hours"),
    "a line of the script": (["cluster.partition='main\n#SBATCH --uid=0'"], "must be without spaces or quotes"),
    "a folder that Slurm reads otherwise": (
        ["run.folder=/data/a b"],
        "has characters that a job script reads its own way",
    ),
    "a sweep of another size": (
        ["--array", "3", "optim.lr=1e-3,2e-3"],
        "optim.lr has 2 values: --array 2 would work, not 3",
    ),
    "a sweep of what an array has in common": (
        ["--array", "2", "cluster.time=60,90"],
        "cluster.time cannot differ between",
    ),
    "a container without an interpreter": (
        ["cluster.container=a.sqsh"],
        "cluster.python=python3, or its path in the image",
    ),
    "a folder that a shell reads otherwise": (
        ["run.folder=/data/a;id"],
        "has characters that a job script reads its own way",
    ),
    "a job that is no number": (["--after", "12;ls"], "--after 12;ls: a job's number"),
    "no Slurm": ([], "no sinfo on the path: this is not a node from which jobs are submitted"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_in_a_line(mistake: str, prepared: str, tmp_path: Path, outside: dict[str, str]) -> None:
    words, said = MISTAKES[mistake]
    fixed = [*overrides(prepared, tmp_path / "run"), "--cluster", "cpu", "--nodes", "1"]
    began = time.monotonic()
    assert said in refused([*fixed, *words], outside, tmp_path)
    assert time.monotonic() - began < 2


def test_a_lead_is_held_against_the_saves_that_were_measured(
    prepared: str, tmp_path: Path, outside: dict[str, str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    Journal(Folder(folder), True).event("save", 10, seconds=50.0, stall=1.0)
    fixed = [*overrides(prepared, folder), "--cluster", "cpu", "--nodes", "1"]
    said = refused(fixed, outside, tmp_path)
    assert "cluster.lead=60 s is too short: saves of this run took up to 50 s; cluster.lead=100 would work" in said
    assert "no sinfo" in refused([*fixed, "cluster.lead=100"], outside, tmp_path)


def test_a_cluster_of_ones_own_is_a_file(prepared: str, tmp_path: Path, outside: dict[str, str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("tasks: 3\npartition: here\nenvironment: {A: \"1 'b'\"}\n")
    fixed = [*overrides(prepared, tmp_path / "run"), "--cluster", str(mine), "--nodes", "1", "train.global_batch=6"]
    done = subprocess.run(
        [*PROGRAM, "submit", "demo", *fixed, "--dry-run"], capture_output=True, text=True, env=outside, timeout=20
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --ntasks-per-node=3\n" in done.stdout and "#SBATCH --partition=here\n" in done.stdout
    assert "export A='1 '\"'\"'b'\"'\"''\n" in done.stdout and not (tmp_path / "run").exists()
    mine.write_text("taskss: 3\n")
    assert "Did you mean: 'tasks'" in refused(fixed, outside, tmp_path)


@pytest.mark.parametrize(
    ("said", "seconds", "written"),
    [
        ("12:00:00", 43200, "0-12:00:00"),
        ("10:00", 600, "0-00:10:00"),
        ("2-12", 216000, "2-12:00:00"),
        ("1-02:03:04", 93784, "1-02:03:04"),
        ("90", 90, "0-00:01:30"),
    ],
)
def test_times_mean_what_they_say(said: str, seconds: int, written: str) -> None:
    """YAML reads 12:00:00 as a number of seconds, to the base of 60."""
    run = read("demo", [f"cluster.time={said}", "cluster.lead=10", "parallel.tensor=1"])
    assert run.cluster.limit == seconds
    assert f"#SBATCH --time={written}\n" in plan([run], Request(1)).script


@pytest.mark.parametrize(
    ("number", "wanted", "same"),
    [
        ("12", "12", True),
        ("12_3", "12", True),
        ("12_[2-4%1]", "12", True),
        ("12_3", "12_3", True),
        ("12_3", "12_4", False),
        ("12_[2-4%1]", "12_3", True),
        ("12_[1,5-9]", "12_5", True),
        ("12_[1,5-9]", "12_3", False),
        ("13_3", "12_3", False),
        ("120", "12", False),
    ],
)
def test_numbers_of_jobs_and_of_their_tasks(number: str, wanted: str, same: bool) -> None:
    assert same_job(number, wanted) == same


def test_overrides_of_a_sweep() -> None:
    assert spread(["a=1", "--b=2,3", "c=[1,2]"], 2) == [["a=1", "--b=2", "c=[1,2]"], ["a=1", "--b=3", "c=[1,2]"]]
    assert spread(["a=1", "c=[1,2]"], 2) == [["a=1", "c=[1,2]"]]


def test_what_the_cluster_refuses(slurm: Cluster, prepared: str, tmp_path: Path) -> None:
    fixed = [*overrides(prepared, tmp_path / "run"), "--cluster", "cpu", "train.global_batch=72"]
    for words, said in (
        (
            ["--nodes", "1", "cluster.partition=mian"],
            "cluster.partition=mian: this cluster has grace, high, lim, low, main",
        ),
        (["--nodes", "18"], "--nodes 18: the largest partition has 16 nodes"),
        (["--nodes", "3", "cluster.partition=lim"], "Slurm refuses the job: "),
        (["--nodes", "1", "cluster.memory=9T"], "Slurm refuses the job: "),
    ):
        assert said in refused([*fixed, *words], slurm.env, tmp_path)
    assert not (tmp_path / "run").exists() and not slurm.said("squeue", "-h")
    tried = slurm.said(*PROGRAM, "submit", "demo", *fixed, "--nodes", "3", "--test-only")
    assert "to start at" in tried and not (tmp_path / "run").exists()


@pytest.mark.parametrize("way", ["read-only", "full", "a file"])
def test_a_run_folder_that_cannot_be_written(way: str, slurm: Cluster, prepared: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if way == "a file":
        place.write_text("")
    else:
        place.mkdir()
        options = "ro" if way == "read-only" else "size=8k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
        if way == "full":
            (place / "ballast").write_bytes(bytes(4096))
    try:
        fixed = [*overrides(prepared, place / "run"), "--cluster", "cpu", "--nodes", "1"]
        done = subprocess.run([*PROGRAM, "submit", "demo", *fixed], capture_output=True, text=True, env=slurm.env)
        assert done.returncode == 78 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"cannot write the run folder {place}/run: " in done.stderr and not slurm.said("squeue", "-h")
    finally:
        if way != "a file":
            subprocess.run(["umount", str(place)], check=True)


def test_who_is_known_to_hold_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of this host at once, another host's by its beats; who is dead, or cannot be heard, holds nothing."""
    hold, mine = Hold(tmp_path, 0.5), this_process(3)
    assert alive(hold) is None
    hold.write(mine)
    assert alive(hold) == mine
    far: dict[str, Any] = {**mine.__dict__, "host": "elsewhere"}
    (tmp_path / "holder.json").write_text(json.dumps(far))
    assert alive(hold) is None
    beats = iter(range(5, 50))
    plain = hold.read
    monkeypatch.setattr(hold, "read", lambda: plain().__class__(**{**far, "beat": next(beats)}) if plain() else None)
    found = alive(hold)
    assert found is not None and found.host == "elsewhere"
