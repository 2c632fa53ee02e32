"""A disk that is full while a run saves: said, survived, and tried again."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nlscale.config.errors import UserError
from nlscale.runtime.folder import Folder, read_lines
from nlscale.testing import ranks
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
    from nlscale.train import loop

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


def test_the_last_save_must_succeed(small_disk: Path, prepared: str) -> None:
    run = small_run(prepared, small_disk / "run", "train.steps=8", "checkpoint.interval=4")
    folder = Folder(Path(run.folder))
    said = ranks(2, with_ballast, run, (4, 99), small_disk / "ballast")
    assert said == ["the last save failed; mend that and go on"] * 2
    assert folder.steps() == [4]
    (small_disk / "ballast").unlink()
    ranks(2, train, run)
    assert folder.steps()[0] == 8
