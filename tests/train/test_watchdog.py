"""A rank that is stopped ends the job with its name; one that is slow is named and the run goes on."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from nlscale.config.run import Run
from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train import loop
from tests.corpus import small_run
from tests.records import events, hashes, losses, shards


def disturbed(run: Run, at: int, what: str) -> None:
    """Trains; rank 1 stops itself or sleeps before it takes its rows."""
    plain = loop.train_step

    def step(state: Any, *rest: Any) -> Any:
        if what == "wait" and state.step >= at:
            time.sleep(120)
        if os.environ["RANK"] == "1" and what == "stop" and state.step == at:
            os.kill(os.getpid(), signal.SIGSTOP)
        if os.environ["RANK"] == "1" and what == "slow" and state.step == at:
            state.loader.iterator = slow(state.loader.iterator)
        return plain(state, *rest)

    def slow(iterator: Any) -> Any:
        for rows in iterator:
            time.sleep(0.15)
            yield rows

    loop.train_step = step
    loop.train(run)


def test_a_stopped_rank_ends_the_job_and_is_named(prepared: str, tmp_path: Path) -> None:
    """SIGSTOP, as a hung collective: stacks, cause, end in seconds; then the run goes on with the same bits."""
    small = ["train.steps=8", "checkpoint.interval=4", "model.layers=1", "cluster.watchdog=2"]
    run, whole = (small_run(prepared, tmp_path / name, *small) for name in ("run", "whole"))
    began = time.monotonic()
    with pytest.raises(RuntimeError) as ended:
        ranks(2, disturbed, run, 5, "stop")
    assert time.monotonic() - began < 40
    (hung,) = events(run, "hung")
    host = socket.gethostname()
    missing = f"nothing went on for 2 s after step 5; no sign of life from rank 1 (host {host}, last after "
    assert hung["cause"].startswith(missing)
    said = str(ended.value)
    assert "ended with 70" in said and "in train_step" in said
    assert hung["cause"] in said
    ranks(2, loop.train, run)
    ranks(2, loop.train, whole)
    assert (losses(run), hashes(run)) == (losses(whole), hashes(whole)) and len(losses(run)) == 8
    assert shards(run, 8) == shards(whole, 8)


def test_where_every_rank_waits_none_is_blamed(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", "train.steps=8", "model.layers=1", "cluster.watchdog=1")
    with pytest.raises(RuntimeError, match="ended with 70"):
        ranks(2, disturbed, run, 3, "wait")
    (hung,) = events(run, "hung")
    assert hung["rank"] == 0 and "every rank lives and waits" in hung["cause"]


def test_a_slow_rank_is_named_and_the_run_goes_on(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", "train.steps=24", "model.layers=1", "cluster.watchdog=30")
    ranks(2, disturbed, run, 1, "slow")
    (found,) = events(run, "straggler")
    assert found["rank"] == 1 and found["at"] == socket.gethostname() and found["seconds"] > 0.15 > found["median"]
    assert Folder(Path(run.folder)).steps()[0] == 24
