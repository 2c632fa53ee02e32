"""Where a run's rows come from: its training rows, those that levels replay, those held out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nlscale.config.run import Run
from nlscale.data.card import check_replay
from nlscale.data.loader import HeldOut, Loader
from nlscale.runtime.folder import Folder
from nlscale.runtime.log import Journal
from nlscale.runtime.world import World


def quarantine(run: Run, world: World) -> Callable[[str], None]:
    """What is told of shards whose rows are left out: every rank, or process of its loader, says what it found.

    The event's step is 0: a loader reads ahead, and does not know for which step.
    """

    def found(fault: str) -> None:
        journal = Journal(Folder(Path(run.folder)), True)
        journal.event("damaged shard", 0, rank=world.rank, fault=fault)
        journal.say(f"rank {world.rank}: {fault}")

    return found


def open_loader(run: Run, world: World) -> Loader:
    """Training rows."""
    follow = run.model.reset == "never"
    return Loader(run.data, run.train.global_batch, world, follow, found=quarantine(run, world))


def open_replay(run: Run, world: World) -> tuple[Loader, str]:
    """The rows that levels replay, and which dataset they are of."""
    earlier, card = check_replay(run.data)
    found = quarantine(run, world)
    return Loader(earlier, run.data.replay_batch, world, name="data.replay_batch", found=found), card.fingerprint


def open_held_out(run: Run, world: World) -> tuple[np.ndarray, int] | None:
    """This replica's held-out rows, read once; None where nothing is evaluated."""
    if not run.train.evaluate_rows:
        return None
    interleaved = run.parallel.pipeline if run.parallel.virtual_pipeline > 1 else 1
    return HeldOut(
        run.data, run.train.evaluate_rows, run.train.micro_batch * interleaved, world, quarantine(run, world)
    ).rows()
