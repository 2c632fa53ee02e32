"""A job that is killed whole, its shared memory left behind, starts again beside one that lives and hears nothing of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.corpus import LEVELS, MODEL, REST, TRAIN, small_run
from tests.records import events, hashes, losses

SHARED = Path("/dev/shm")
PROGRAM = [sys.executable, "-m", "nlscale.cli", "train", "demo"]


def started(prepared: str, folder: Path, steps: int) -> subprocess.Popen:
    """A job of two ranks, in a session of its own."""
    said = [LEVELS, *MODEL, *TRAIN, *REST, f"data.path={prepared}", f"run.folder={folder}", "model.layers=1"]
    said += [
        f"train.steps={steps}",
        "train.micro_batch=1",
        "checkpoint.interval=5",
        "optim.schedule=wsd",
        "optim.decay=0",
        "optim.warmup=0",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*PROGRAM, *said, "--nproc", "2"], start_new_session=True, **quiet)  # type: ignore[call-overload]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stale_shared_memory_is_no_obstacle_and_no_neighbours_is_touched(prepared: str, tmp_path: Path) -> None:
    ended, alive = (small_run(prepared, tmp_path / name) for name in ("ended", "alive"))
    there = set(SHARED.iterdir())
    first, neighbour = started(prepared, Path(ended.folder), 20), started(prepared, Path(alive.folder), 100_000)
    try:
        until = time.monotonic() + 250
        while len(losses(ended)) < 7 or len(losses(alive)) < 1:
            assert time.monotonic() < until and first.poll() is None and neighbour.poll() is None
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
        assert first.wait(20) == -signal.SIGKILL and set(SHARED.iterdir()) - there
        assert started(prepared, Path(ended.folder), 20).wait(200) == 0
        assert events(ended, "restore") and neighbour.poll() is None
        done = len(losses(alive))
        while len(losses(alive)) < max(20, done + 3):
            assert time.monotonic() < until and neighbour.poll() is None
            time.sleep(0.02)
    finally:
        for job in (first, neighbour):
            os.killpg(job.pid, signal.SIGTERM) if job.poll() is None else None
    assert neighbour.wait(100) == 75
    assert (losses(ended), hashes(ended)) == (losses(alive)[:20], hashes(alive)[:20])
