"""`nlscale status` of a job that never ran: by the queue while it remembers, then by accounting, then not at all."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import PROGRAM, submit


@pytest.fixture(scope="module")
def accounting(machine: Cluster) -> Iterator[Cluster]:
    """One node, with slurmdbd."""
    paths = os.environ["PATH"] + ":/usr/sbin"
    for tool in ("slurmdbd", "mariadbd", "mariadb-install-db", "my_print_defaults"):
        if not shutil.which(tool, path=paths):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no accounting here: {tool} is not installed")
    cluster = Cluster(nodes=1, ACCT=1, GPUS=0)
    yield cluster
    cluster.down()


def state(slurm: Cluster, folder: Path, forgotten: Path | None) -> str:
    """Second column of `status`; `forgotten`: a folder for a queue that remembers no job."""
    environment = dict(slurm.env)
    if forgotten is not None:
        (forgotten / "squeue").write_text("#!/bin/sh\necho '{\"jobs\": []}'\n")
        (forgotten / "squeue").chmod(0o755)
        environment["PATH"] = f"{forgotten}:{environment['PATH']}"
    command = [*PROGRAM, "status", str(folder)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return said.splitlines()[1].split()[1]


def cancelled(slurm: Cluster, prepared: str, folder: Path) -> Path:
    run = submit(slurm, folder, prepared, "cluster.options=[--begin=now+1hour]", "cluster.tasks=1", nodes=1)
    assert state(slurm, folder, None) == "pending"
    slurm.said("scancel", run.job)
    run.ended()
    return folder


def test_accounting_knows_what_the_queue_has_forgotten(accounting: Cluster, prepared: str, tmp_path: Path) -> None:
    folder = cancelled(accounting, prepared, tmp_path / "run")
    assert state(accounting, folder, None) == "cancelled"
    accounting.wait(lambda: state(accounting, folder, tmp_path) == "cancelled", "accounting", 20)


def test_without_accounting_the_record_is_all(slurm: Cluster, prepared: str, tmp_path: Path) -> None:
    folder = cancelled(slurm, prepared, tmp_path / "run")
    assert state(slurm, folder, None) == "cancelled"
    assert state(slurm, folder, tmp_path) == "ended"
