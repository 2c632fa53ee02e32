"""`nlscale train`."""

import argparse
import atexit
import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from nlscale_launch.local import start
from nlscale_launch.policy import attempts_of, verdict

from nlscale.config.errors import CODES, FINISHED, SAVED_ON_SIGNAL, code_of, require
from nlscale.config.run import Run, replicas
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.log import Journal
from nlscale.runtime.outcome import LOGS, blamed, tell, told
from nlscale.runtime.quiet import quiet
from nlscale.runtime.watch import Watch
from nlscale.verbs.common import add, add_recipe, fewer_gpus, resolve

MANY = 64  # ranks a core that one machine would start


def verbs(parent: Any) -> None:
    """Adds them."""
    made = add(parent, "train", train, "train a run, or go on where its folder left off")
    add_recipe(made)
    made.add_argument("--nproc", type=int, help="ranks to start here; unset: cluster.nproc, or what the layout needs")
    made.add_argument("--restart", action="store_true", help="start again after a crash, while the run gets further")


def train(options: argparse.Namespace) -> int:
    """`nlscale train`: one rank under srun or torchrun, else all ranks of this machine."""
    if (given := rank_given(options)) is not None:
        with Watch() as watch:
            leave(lambda: as_rank(options, given, watch))
    require(options.nproc is None or options.nproc >= 1, f"--nproc {options.nproc} must be at least 1")
    run = resolve(options.recipe, options.overrides)
    folder = Folder(Path(run.folder))
    count = options.nproc or run.cluster.nproc or run.parallel.ranks
    replicas(run, count)
    cores = os.cpu_count() or 1
    require(
        count <= MANY * cores, f"{count} ranks would start on this machine's {cores} cores; at most {MANY * cores} are"
    )
    fewer_gpus(count, "training")
    quiet()
    for name in needed(run, count):
        importlib.import_module(name)
    code = again_and_again(folder, run, count) if options.restart else start_here(folder, run, count)
    if code == FINISHED:
        conclude(folder)
    return code


def needed(run: Run, count: int) -> Iterator[str]:
    """What ranks would import one by one once they need it: here they are forked with it."""
    yield "nlscale.train.loop"
    if count > run.parallel.tensor * run.parallel.pipeline:  # copies of a shard are DeepSpeed's to serve
        yield "nlscale.optim.zero"
    if run.train.recompute != "none":
        yield "torch._dynamo"
    if run.train.compile != "none":
        yield "torch._inductor.compile_fx"


def rank_given(options: argparse.Namespace) -> int | None:
    """The rank that torchrun or srun has given this process; None in a job's own shell, which starts its ranks itself."""
    environment = os.environ
    if "RANK" in environment:
        return int(environment["RANK"])
    step = "SLURM_STEP_ID" in environment and "SLURM_PTY_PORT" not in environment
    return int(environment["SLURM_PROCID"]) if step and options.nproc is None else None


def as_rank(options: argparse.Namespace, rank: int, watch: Watch) -> int:
    """The life of a rank that a launcher has started; signals are noted since before it reads its recipe."""
    run = resolve(options.recipe, options.overrides)
    if rank == 0 and LOGS not in os.environ:  # nobody else has opened an attempt
        return attempted(Folder(Path(run.folder)), lambda logs: train_rank(run, rank, watch))
    return train_rank(run, rank, watch)


def start_here(folder: Folder, run: Run, count: int) -> int:
    """One attempt of `count` ranks on this machine."""

    def rank(number: int) -> int:
        with Watch() as watch:
            return train_rank(run, number, watch)

    def ranks(logs: Path) -> int:
        environment = {LOGS: str(logs)}
        return start(count, rank, environment, logs=str(logs), speak=True)

    return attempted(folder, ranks)


def attempted(folder: Folder, ranks: Callable[[Path], int]) -> int:
    """Runs ranks as an attempt, whose begin and end stand in the run's events."""
    logs, code = folder.open(), 1
    journal, number = Journal(folder, True), int(logs.name)
    journal.event("attempt", folder.newest, attempt=number, job="", nodes=[socket.gethostname()])
    try:
        code = ranks(logs)
    finally:
        why = told(logs).get("message", "")
        journal.event("attempt ended", folder.newest, attempt=number, job="", code=code, reason=why, blamed=[])
    return code


def again_and_again(folder: Folder, run: Run, count: int) -> int:
    """Attempts until the run is finished, wants to wait, or got no further in several (launch/policy.py)."""
    before = len(folder.attempts())
    while True:
        code = start_here(folder, run, count)
        attempts = [each for each in attempts_of(read_lines(folder.events)) if each.number > before]
        judged = verdict(attempts, run.cluster.attempts)
        if code == SAVED_ON_SIGNAL or judged.what != "again":
            if judged.what == "give up":
                Journal(folder, True).event("give up", folder.newest, reason=judged.why)
                print(f"nlscale: {judged.why}", file=sys.stderr)
            return judged.code
        print(f"attempt {attempts[-1].number} ended with {code}: starting again", flush=True)


def train_rank(run: Run, rank: int, watch: Watch) -> int:
    """One rank's part of an attempt, as an exit code."""
    quiet()
    loop = importlib.import_module("nlscale.train.loop")
    try:
        loop.train(run, watch)
    except tuple(CODES) as error:
        tell(code_of(error), rank, str(error))
        print(f"nlscale: {error}", file=sys.stderr)
        return code_of(error)
    except Exception as error:
        tell(1, rank, explained(error, run, rank), blamed(error))
        raise
    return FINISHED


def explained(error: Exception, run: Run, rank: int) -> str:
    """A crash in one line; where memory ran out, with what would need less of it, which is said at once."""
    memory = importlib.import_module("nlscale.train.out_of_memory")
    if not memory.ran_out(error):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    line: str = memory.explained(error, run, Folder(Path(run.folder)), rank, int(os.environ.get("WORLD_SIZE", "1")))
    print(f"nlscale: {line}", file=sys.stderr)
    return line


def leave(rank: Callable[[], int]) -> NoReturn:
    """Ends this process with a rank's exit code: libraries that fall over each other at its end do not change it."""
    code = 1
    try:
        code = rank()
    except tuple(CODES) as error:
        print(f"nlscale: {error}", file=sys.stderr)
        code = code_of(error)
    except Exception:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def conclude(folder: Folder) -> None:
    """What a person wants to know at the end."""
    lines = [line for line in read_lines(folder.metrics) if "train/loss" in line]
    held_out = [line["eval/loss"] for line in read_lines(folder.metrics) if "eval/loss" in line]
    if lines:
        print(f"run folder   {folder.path}")
        print(f"first loss   {lines[0]['train/loss']:.4f}  (step {lines[0]['step']})")
        print(f"last loss    {lines[-1]['train/loss']:.4f}  (step {lines[-1]['step']})")
        if held_out:
            print(f"held-out     {held_out[-1]:.4f}")
        print(f"loss plot    {folder.plot}")
