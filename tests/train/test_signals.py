"""Signals at any moment, to all ranks or one: saved at a step's end by all; a resume has the bits of an unbroken run."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from nlscale_launch.local import start

from nlscale.config.errors import SavedOnSignal
from nlscale.config.run import Run
from nlscale.runtime.watch import Watch, heeded, sparing_children
from nlscale.testing import ranks
from nlscale.train import checkpoint, loop
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.records import events, hashes, losses, shards

STEPS = ["train.steps=12", "checkpoint.interval=4", "train.evaluate_rows=4", "train.evaluate_interval=3"]
USR2, TERM = signal.SIGUSR2, signal.SIGTERM
MOMENTS: dict[str, tuple[str, list[int], int]] = {  # place, signals, the rank that hears them (-1: all)
    "while it is built": ("built", [USR2], -1),
    "while it restores": ("restore", [TERM], -1),
    "in a step": ("forward", [USR2], -1),
    "in a step, TERM": ("forward", [TERM], -1),
    "in an evaluation": ("evaluation", [USR2], -1),
    "in a save": ("save", [USR2], -1),
    "as shards are written": ("write", [TERM], 0),
    "to one rank": ("forward", [USR2], 1),
    "a terminal hangs up": ("forward", [signal.SIGHUP], -1),
    "twice": ("forward", [USR2, TERM, USR2], -1),
}


def signalled(run: Run, place: str, numbers: list[int], to: int) -> str:
    """Trains; at the place, this process hears the signals once."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup ignore it
    heard: list[int] = []

    def shouting(function: Callable[..., Any], after: int = 0) -> Callable[..., Any]:
        calls = [0]

        def wrapped(*arguments: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] > after and not heard and to in (-1, int(os.environ["RANK"])):
                heard.extend(numbers)
                for number in numbers:
                    os.kill(os.getpid(), number)
            return function(*arguments, **more)

        return wrapped

    if place == "built":
        loop.built = shouting(loop.built)
    elif place == "evaluation":
        loop.held_out_loss = shouting(loop.held_out_loss)
    elif place == "forward":
        plain = loop.built

        def built(*arguments: Any) -> Any:
            state, model = plain(*arguments)
            return state, replace(model, forward_backward=shouting(model.forward_backward, 5))

        loop.built = built
    else:
        name = {"restore": "restore", "save": "save", "write": "write"}[place]
        setattr(checkpoint.Checkpoints, name, shouting(getattr(checkpoint.Checkpoints, name)))
    try:
        with Watch() as watch:
            train(run, watch)
    except SavedOnSignal as error:
        return str(error)
    return "finished"


@pytest.fixture(scope="module")
def unbroken(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = small_run(prepared, tmp_path_factory.mktemp("unbroken"), *STEPS)
    ranks(2, train, run)
    return run


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment(moment: str, unbroken: Run, prepared: str, tmp_path: Path) -> None:
    place, numbers, to = MOMENTS[moment]
    run = small_run(prepared, tmp_path, *STEPS)
    said = ranks(2, signalled, run, place, numbers, to)
    assert said[0] == said[1] and said[0].startswith("saved at step"), said
    (stop,) = events(run, "stop")
    at = {"built": 1, "restore": 1, "evaluation": 4, "save": 5, "forward": 5}.get(place)
    assert stop["step"] == at or (at is None and 5 <= stop["step"] <= 7), stop
    ranks(2, train, run)
    assert losses(run) == losses(unbroken) and hashes(run) == hashes(unbroken)
    assert shards(run, 12) == shards(unbroken, 12)


@pytest.mark.parametrize(("lead", "said"), [(0, True), (3600, False)])
def test_a_lead_that_leaves_too_little_for_a_save_is_said(
    lead: int, said: bool, prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    run = small_run(prepared, tmp_path, "train.steps=4", "checkpoint.interval=2", f"cluster.lead={lead}")
    ranks(1, train, run)
    found = [(event["step"], event["lead"]) for event in events(run, "lead too short")]
    assert found == ([(2, lead)] if said else [])


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Watch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
        assert watch.asked is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.SIGHUP not in heeded()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Watch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
        assert watch.asked == "SIGHUP" and signal.SIGHUP in heeded()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_children_do_not_hear_what_ranks_hear() -> None:
    """Slurm sends a job's signals to its every process: those that ranks start must live on."""
    for spared in (True, False):
        with Watch():
            if spared:
                with sparing_children():
                    pid = os.posix_spawn("/bin/sleep", ["sleep", "30"], os.environ)
            else:
                pid = os.posix_spawn("/bin/sleep", ["sleep", "30"], os.environ)
        os.kill(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGTERM)
        done, _ = os.waitpid(pid, os.WNOHANG if spared else 0)
        assert (done == 0) == spared
        os.kill(pid, signal.SIGKILL) if spared else None
        os.waitpid(pid, 0) if spared else None


def compiling(run: Run) -> bool:
    """Whether a process that the first step starts, as compilers are, outlives a signal to every process of the job."""
    children: list[subprocess.Popen] = []
    plain = loop.train_step

    def step(*arguments: Any) -> Any:
        if not children:
            children.append(subprocess.Popen(["sleep", "60"]))
            for process in (children[0].pid, os.getpid()):
                os.kill(process, USR2)
        return plain(*arguments)

    loop.train_step = step
    try:
        with pytest.raises(SavedOnSignal), Watch() as watch:
            train(run, watch)
        return children[0].poll() is None
    finally:
        children[0].kill()


def test_what_compiles_in_the_first_step_outlives_a_signal(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path, *STEPS)
    assert ranks(1, compiling, run) == [True]
    (stop,) = events(run, "stop")
    assert stop["step"] <= 2


def reading(run: Run) -> bool:
    """Whether processes that read rows outlive a signal to every process of the job, until their rank has saved.

    Another process sends it, as Slurm does: torch's workers take their parent's for an order to end.
    """
    workers: list[psutil.Process] = []
    plain = loop.train_step

    def step(*arguments: Any) -> Any:
        if arguments[0].step == 3:
            workers.extend(psutil.Process().children())
            subprocess.run(["kill", "-TERM", *(str(each.pid) for each in workers), str(os.getpid())], check=True)
            time.sleep(0.5)
        return plain(*arguments)

    loop.train_step = step
    with pytest.raises(SavedOnSignal), Watch() as watch:
        train(run, watch)
    return bool(workers)


def test_processes_that_read_rows_outlive_a_signal(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path, *STEPS, "data.workers=2")
    assert ranks(1, reading, run) == [True]
    (stop,) = events(run, "stop")
    assert (stop["step"], stop["signal"]) == (4, "SIGTERM")


def test_ranks_do_not_outlive_a_launcher_that_is_killed(prepared: str, tmp_path: Path) -> None:
    """Nobody would watch them, and the next start would find the run held: they save, and end."""
    run = small_run(prepared, tmp_path, "train.steps=100000", "checkpoint.interval=100000", "train.evaluate_interval=0")

    def trains(rank: int) -> None:
        with Watch() as watch:
            train(run, watch)

    launcher, left = os.fork(), list[psutil.Process]()
    if launcher == 0:
        try:
            os._exit(start(2, trains, logs=str(tmp_path)))
        finally:
            os._exit(1)
    try:
        while not losses(run):
            assert os.waitpid(launcher, os.WNOHANG) == (0, 0)
            time.sleep(0.05)
        left = psutil.Process(launcher).children()
    finally:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
    deadline = time.monotonic() + 60
    while (alive := [each for each in left if living(each)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in alive:
        process.kill()
    (stop,) = events(run, "stop")
    assert len(left) == 2 and not alive and stop["signal"] == "SIGTERM" and shards(run, stop["step"])


def living(process: psutil.Process) -> bool:
    """Whether it runs: an orphan that has ended may wait for somebody to take note."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
