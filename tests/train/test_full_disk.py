"""A disk that is full while a run saves: said, survived, and tried again."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nlscale.config.errors import UserError
from nlscale.config.run import Run
from nlscale.runtime.folder import Folder, read_lines
from nlscale.testing import ranks
from nlscale.train import loop
from nlscale.train.loop import train
from nlscale.train.manifest import verify
from tests.corpus import small_run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four checkpoints' size; skipped where this user may mount none."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def heard_of(events: Path, step: int, kind: str) -> None:
    """Waits for an event."""
    until = time.monotonic() + 20
    while not any((line["step"], line["event"]) == (step, kind) for line in read_lines(events)):
        assert time.monotonic() < until, f"no {kind} of step {step}"
        time.sleep(0.01)


def with_ballast(run, steps: tuple[int, int], ballast: Path) -> str:  # type: ignore[no-untyped-def]
    """Trains; between these steps nothing is left of the disk."""
    plain = loop.train_step

    def step(state, *rest):  # type: ignore[no-untyped-def]
        events = Folder(Path(run.folder)).events
        if state.world.leads and state.step in steps:  # saves are written beside steps
            heard_of(events, state.step, "save" if state.step == steps[0] else "save failed")
        if state.world.leads and state.step == steps[0]:
            free = shutil.disk_usage(ballast.parent).free
            ballast.write_bytes(b"\0" * max(0, free - 2**16))
        if state.world.leads and state.step == steps[1]:
            ballast.unlink(missing_ok=True)
        return plain(state, *rest)

    loop.train_step = step
    try:
        train(run)
    except UserError as error:
        return str(error)
    return "finished"


@pytest.mark.parametrize("count", [1, 2])
def test_a_save_that_finds_no_room_is_said_and_the_next_one_tries_again(
    count: int, small_disk: Path, prepared: str
) -> None:
    run = small_run(prepared, small_disk / "run", "train.steps=12", "checkpoint.interval=4", "checkpoint.keep=1")
    folder = Folder(Path(run.folder))
    assert ranks(count, with_ballast, run, (4, 8), small_disk / "ballast") == ["finished"] * count
    assert folder.steps() == [12] and verify(folder.checkpoint(12)) == []
    failed = [line for line in read_lines(folder.events) if line["event"] == "save failed"]
    assert [line["step"] for line in failed] == [8] and failed[0]["need"] > failed[0]["free"]
    assert "No space left" in failed[0]["reason"]
    assert not list((folder.path / "checkpoints").glob(".*"))


def with_read_only(run: Run, begin: int, end: int, disk: Path) -> None:
    """Trains; between these steps nothing can be written to the disk."""
    plain, written = loop.train_step, Folder(Path(run.folder)).checkpoint(begin) / "manifest.json"

    def step(state: Any, *rest: Any) -> Any:
        if state.world.leads and state.step == begin:
            until = time.monotonic() + 20
            while not written.exists() and time.monotonic() < until:
                time.sleep(0.01)
            remount(disk, "ro")
        if state.world.leads and state.step == end:
            time.sleep(1.0)  # the save beside the run has been refused by then
            remount(disk, "rw")
        return plain(state, *rest)

    loop.train_step = step
    loop.train(run)


def remount(disk: Path, how: str) -> None:
    """Waits for files that are open to be written."""
    for _ in range(200):
        command = ["mount", "-o", f"remount,{how}", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.02)
    raise AssertionError(f"{disk} stays as it is")


def test_a_disk_that_is_read_only_for_a_while(small_disk: Path, prepared: str) -> None:
    """Saves are refused and said; records wait; when it can be written again, nothing of them is missing."""
    small = ["train.steps=16", "checkpoint.interval=4", "checkpoint.keep=1", "model.layers=1", "log.wandb=disabled"]
    run = small_run(prepared, small_disk / "run", *small)
    ranks(2, with_read_only, run, 4, 10, small_disk)
    folder = Folder(Path(run.folder))
    assert folder.steps() == [16] and verify(folder.checkpoint(16)) == []
    assert [line["step"] for line in read_lines(folder.metrics)] == list(range(1, 17))
    told = [(line["event"], line["step"]) for line in read_lines(folder.events)]
    refused = [line["reason"] for line in read_lines(folder.events) if line["event"] == "save failed"]
    assert [each for each in told if each[0] in ("save", "save failed")] == [
        ("save", 4),
        ("save failed", 8),
        ("save", 12),
        ("save", 16),
    ]
    assert "Read-only file system" in refused[0]


def test_the_last_save_must_succeed(small_disk: Path, prepared: str) -> None:
    run = small_run(prepared, small_disk / "run", "train.steps=8", "checkpoint.interval=4")
    folder = Folder(Path(run.folder))
    said = ranks(2, with_ballast, run, (4, 99), small_disk / "ballast")
    assert said == ["the last save failed; mend that and go on"] * 2
    assert folder.steps() == [4]
    (small_disk / "ballast").unlink()
    ranks(2, train, run)
    assert folder.steps()[0] == 8
