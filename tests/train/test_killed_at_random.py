"""A real run of two ranks, killed again and again at random moments, ends with the bits of one that was not."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nlscale.config.run import Run
from nlscale.runtime.folder import Folder, read_lines
from nlscale.testing import ranks
from nlscale.train import loop
from tests.corpus import small_run
from tests.faults import attempt
from tests.records import hashes, losses, shards

SMALL = ["model.layers=1", "checkpoint.interval=3", "checkpoint.keep=2", "cluster.threads=1"]


def killed(run: Run, rank: int, after: int, seconds: float) -> None:
    """Trains; `rank` is killed some time after it has made `after` steps."""
    plain, made = loop.train_step, [0]

    def end() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def step(state: Any, *rest: Any) -> Any:
        report = plain(state, *rest)
        made[0] += 1
        if made[0] == after and int(os.environ["RANK"]) == rank:
            threading.Thread(target=end, daemon=True).start()
        return report

    loop.train_step = step
    loop.train(run)


def campaign(prepared: str, folder: Path, steps: int, kills: int, seed: int) -> int:
    """Kills and resumes, then lets the run come to its end; gives the number of kills."""
    chance = random.Random(seed)
    run, whole = (small_run(prepared, folder / name, *SMALL, f"train.steps={steps}") for name in ("run", "whole"))
    done = 0
    while done < kills:
        rank, after, seconds = chance.randrange(2), chance.randint(1, 9), chance.uniform(0, 0.12)
        done += not attempt(lambda rank=rank, after=after, seconds=seconds: ranks(2, killed, run, rank, after, seconds))
        assert Folder(Path(run.folder)).steps()[:1] != [steps], f"the run ended after {done} kills: give it more steps"
    ranks(2, loop.train, run)
    ranks(2, loop.train, whole)
    assert (losses(run), hashes(run)) == (losses(whole), hashes(whole))
    assert shards(run, steps) == shards(whole, steps)
    check_starts(run)
    return done


def check_starts(run: Run) -> None:
    """Every start went on from the last checkpoint that was said to be there, or from a newer one."""
    saved = 0
    for line in read_lines(Folder(Path(run.folder)).events):
        assert line["event"] != "damaged checkpoint"
        saved = max(saved, line["step"]) if line["event"] == "save" else saved
        assert line["event"] != "restore" or line["step"] >= saved


def test_a_run_killed_three_times(prepared: str, tmp_path: Path) -> None:
    assert campaign(prepared, tmp_path, 45, 3, 1) == 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_fifty_times(prepared: str, tmp_path: Path) -> None:
    assert campaign(prepared, tmp_path, 500, 50, 2) == 50
    print("\n50 kills of a run of 500 steps: every start went on from the last commit; same bits at the end")
