"""One writer a run folder: real processes that live, die, are stopped and come back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nlscale.config.errors import StoppedOnPurpose, UserError
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.holder import Hold, this_process
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run

ELSEWHERE = """
import sys, time, socket
from pathlib import Path
from nlscale.runtime import holder
if len(sys.argv) > 2:
    socket.gethostname = lambda: sys.argv[2]
hold = holder.Hold(Path(sys.argv[1]), 1.2)
print(hold.take() or "taken", flush=True)
for line in sys.stdin:
    try:
        with hold.committing():
            print("committed", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
hold.release()
"""


class Other:
    """A holder in a process of its own, on this host or on one that calls itself otherwise."""

    def __init__(self, folder: Path, *host: str) -> None:
        command = [sys.executable, "-c", ELSEWHERE, str(folder), *host]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout and self.process.stdin
        self.first = self.process.stdout.readline().strip()

    def commit(self) -> str:
        assert self.process.stdout and self.process.stdin
        self.process.stdin.write("commit\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def others() -> Iterator[list[Other]]:
    made: list[Other] = []
    yield made
    for each in made:
        each.end()


def test_the_second_is_refused_and_the_holder_named(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(tmp_path))
    with pytest.raises(
        UserError, match=rf"held by attempt 1 \(host .*, process {others[0].process.pid}\), which is alive"
    ):
        Hold(tmp_path, 1.2).take()
    assert others[0].commit() == "committed"


def test_a_dead_process_is_taken_over_at_once_and_an_orderly_end_is_no_news(
    tmp_path: Path, others: list[Other]
) -> None:
    others.append(Other(tmp_path))
    others[0].end()
    hold, began = Hold(tmp_path, 60.0), time.monotonic()
    assert f"process {others[0].process.pid}), which is dead" in hold.take()
    assert time.monotonic() - began < 1 and hold.token == 2
    hold.release()
    again = Hold(tmp_path, 60.0)
    assert again.take() == "" and again.token == 3
    again.release()


def test_a_process_id_that_came_again_is_not_the_holder(tmp_path: Path) -> None:
    hold = Hold(tmp_path, 60.0)
    hold.write(replace(this_process(7), born="1"))
    assert "attempt 7" in hold.take() and hold.token == 8
    hold.release()


def test_another_host_is_outwaited_and_fenced_off_when_it_wakes(tmp_path: Path, others: list[Other]) -> None:
    """Split brain: it was only stopped. It beats while it lives, is replaced while it does not, and cannot commit after."""
    others.append(Other(tmp_path, "elsewhere"))
    with pytest.raises(UserError, match="host elsewhere"):
        Hold(tmp_path, 1.2).take()
    os.kill(others[0].process.pid, signal.SIGSTOP)
    hold, began = Hold(tmp_path, 1.2), time.monotonic()
    assert "host elsewhere" in hold.take()
    assert time.monotonic() - began >= 1.2
    os.kill(others[0].process.pid, signal.SIGCONT)
    said = others[0].commit()
    assert said.startswith("StoppedOnPurpose: attempt 2") and "this attempt writes nothing more" in said
    with hold.committing() as mine:
        assert mine.token == 2
    hold.release()


def test_a_requeued_jobs_earlier_life_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first, second = Hold(tmp_path, 60.0), Hold(tmp_path, 60.0)
    first.take()
    with pytest.raises(UserError, match="job 17"):  # of the same life: another step, or another terminal
        second.take()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "job 17" in second.take()
    with pytest.raises(StoppedOnPurpose, match="attempt 2"), first.committing():
        raise AssertionError("entered")
    second.release()


def test_a_run_is_held_while_it_trains_and_its_checkpoints_are_fenced(prepared: str, tmp_path: Path) -> None:
    """Two ranks; another attempt takes the folder between two saves: the second save stops both ranks, with 93."""
    given = ["train.steps=12", "checkpoint.interval=4", "checkpoint.asynchronous=false"]
    run = small_run(prepared, tmp_path / "run", *given)
    folder = Folder(Path(run.folder))

    def replaced() -> str:
        from nlscale.train import loop

        plain = loop.train_step

        def step(state, *rest):  # type: ignore[no-untyped-def]
            report = plain(state, *rest)
            if state.step == 6 and state.world.leads:
                hold = Hold(folder.path, 60.0)
                hold.write(this_process(9))
            return report

        loop.train_step = step
        try:
            train(run)
        except StoppedOnPurpose as error:
            return str(error)
        return "finished"

    said = ranks(2, replaced)
    assert said[0] == said[1] and said[0].startswith("attempt 9")
    assert folder.steps() == [4] and json.loads((folder.path / "holder.json").read_text())["token"] == 9
    (folder.path / "holder.json").write_text(json.dumps({**this_process(9).__dict__, "pid": 2**22 + 1, "born": "5"}))
    ranks(2, train, run)
    assert folder.steps()[0] == 12 and json.loads((folder.path / "holder.json").read_text())["released"]
    assert any(line["event"] == "takeover" and "attempt 9" in line["what"] for line in read_lines(folder.events))
