"""A rank that dies in the middle of a step: the others end soon, it is named, and the run goes on with the same bits."""

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
from nlscale.train.manifest import verify
from tests.corpus import small_run
from tests.records import losses, shards

SMALL = ["model.layers=2", "train.steps=12", "checkpoint.interval=4"]


def dies_in_backward(run: Run, rank: int) -> None:
    """Trains; in the sixth step `rank` is killed as soon as its backward pass reaches the first gradient."""
    plain = loop.train_step

    def step(state: Any, *rest: Any) -> Any:
        if state.step == 5 and int(os.environ["RANK"]) == rank:
            parameter = state.leaves[-1].parameter

            def end(_: Any) -> None:
                Path(run.folder, "killed").write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)

            parameter.register_hook(end)
        return plain(state, *rest)

    loop.train_step = step
    loop.train(run)


@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_killed_in_backward(rank: int, prepared: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, whole = (small_run(prepared, tmp_path / name, *SMALL) for name in ("run", "whole"))
    ranks(2, loop.train, small_run(prepared, tmp_path / "run", *SMALL, "train.stop_at=4"))
    with pytest.raises(RuntimeError, match="ended with 137"):
        ranks(2, dies_in_backward, run, rank)
    assert time.monotonic() - float(Path(run.folder, "killed").read_text()) < 10
    assert f"rank {rank} (host {socket.gethostname()}) ended with -9" in capfd.readouterr().err
    folder = Folder(Path(run.folder))
    assert folder.steps() == [4] and verify(folder.checkpoint(4)) == []
    ranks(2, loop.train, run)
    ranks(2, loop.train, whole)
    assert losses(run) == losses(whole) and shards(run, 12) == shards(whole, 12)
