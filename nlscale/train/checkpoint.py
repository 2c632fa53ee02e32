"""When a run saves, and what it takes over at its start.

A folder without a manifest does not exist for anyone. Nothing is applied before its digest was checked; a damaged
checkpoint is passed over for the newest good one, aloud; a run never starts from scratch while any is there.

A save that nobody waits for is copied to the host, and written by a thread of every rank while the run goes on.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from nlscale.config.errors import StoppedOnPurpose
from nlscale.config.nesting import registry
from nlscale.config.read import dump
from nlscale.config.run import Run
from nlscale.data.card import tokeniser_file
from nlscale.runtime.folder import CONFIG, MANIFEST, STATE, Folder, write_durably
from nlscale.runtime.holder import Hold
from nlscale.runtime.log import Journal
from nlscale.runtime.world import World
from nlscale.train.agree import everywhere, led
from nlscale.train.beside import Beside, Staging
from nlscale.train.manifest import anew, commit, digest, surplus, verify
from nlscale.train.memories import memories
from nlscale.train.pieces import Pieces, save, stored
from nlscale.train.remote import Remote
from nlscale.train.restore import apply
from nlscale.train.state import TrainState
from nlscale.train.windows import windows_to_save

PATIENCE = timedelta(hours=6)  # of the savers' collectives, which wait for whole checkpoints to be sent or fetched


@dataclass
class Draft:
    """What one save writes: nothing of it changes while the run goes on."""

    step: int
    pieces: dict[str, Pieces]
    facts: str  # as text: the state's own go on changing
    began: float
    stall: float = 0.0  # seconds for which the run stood still


class Checkpoints:
    """Saves and restores the state of one run."""

    def __init__(self, run: Run, world: World, folder: Folder, journal: Journal, hold: Hold) -> None:
        """A collective."""
        self.settings, self.world, self.folder, self.journal, self.hold = run.checkpoint, world, folder, journal, hold
        self.run, self.config = run, dump(run)
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)  # saves go on beside steps, and storage is slow
        self.staging, self.beside = Staging(), Beside(world.device)
        self.waiting: Callable[[str], None] = lambda _: None  # told while the run waits for a storage
        self.cluster = run.cluster if "SLURM_JOB_ID" in os.environ else None  # until its lead was found too short
        self.remote = Remote(run, folder, journal, self.group) if run.checkpoint.upload else None

    def due(self, state: TrainState) -> bool:
        """Whether the interval ends at this step."""
        return state.step % self.settings.interval == 0

    @property
    def failed(self) -> bool:
        """Whether the save that nobody waits for has ended in an error, which the next `save` raises."""
        return self.beside.failed

    def save(self, state: TrainState, wait: bool) -> bool:
        """Commits the state of this step; nothing to do where it stands already. A collective.

        `wait`: returns when it is done. Without, where the settings agree, when all is copied; never are two under way.
        False where the disk refused: the last good checkpoint stands. Raises StoppedOnPurpose where another attempt has
        taken the run folder over.
        """
        began = time.monotonic()
        self.settle()
        if led(state.world, partial(self.stands, state.step)):
            return True
        pieces = {**state.shards(), **windows_to_save(state), **memories(state)}
        draft = Draft(state.step, pieces, json.dumps(state.facts()), began)
        wait = wait or not self.settings.asynchronous
        if not wait:
            draft.pieces = self.staging.copies(pieces)
            draft.stall = time.monotonic() - began
        self.beside.start(lambda: self.written(draft))
        return self.settle() if wait else True

    def stands(self, step: int) -> bool:
        """Whether a checkpoint is there already; raises StoppedOnPurpose where another attempt has the run folder."""
        with contextlib.suppress(OSError), self.hold.committing():  # a disk that refuses is said by the save itself
            pass
        return (self.folder.checkpoint(step) / MANIFEST).is_file()

    def settle(self) -> bool:
        """Waits for the save under way, gives its outcome or raises its error. While it is being sent, that is progress."""

        def tell() -> None:
            if self.remote is not None and self.remote.sending:
                self.waiting("a second of sending")

        return self.beside.settle(tell) is not False

    def written(self, draft: Draft) -> bool:
        """Writes, commits, uploads. A collective of the savers' group."""
        try:
            self.write(draft, self.folder.checkpoint(draft.step))
        except (OSError, CheckpointException) as error:  # the latter is no Exception
            self.refused(draft, error)
            return False
        seconds = time.monotonic() - draft.began
        self.journal.event("save", draft.step, seconds=round(seconds, 3), stall=round(draft.stall or seconds, 3))
        if self.cluster is not None and (need := self.cluster.least_lead(seconds, 0.0)) > self.cluster.lead:
            lead, self.cluster = self.cluster.lead, None
            self.journal.event("lead too short", draft.step, lead=lead, seconds=round(seconds, 3))
            self.journal.say(
                f"the save of step {draft.step} took {seconds:.0f} s: a signal cluster.lead={lead} s before the "
                f"job's end leaves too little for it; cluster.lead={need:.0f} would do"
            )
        if self.remote is not None:
            self.remote.upload(draft.step, self.world)
        return True

    def write(self, draft: Draft, final: Path) -> None:
        """Shards, facts, manifest, commit."""
        world, group = self.world, self.group
        draft_folder = led(world, lambda: anew(final.with_name(f".{final.name}.{self.hold.token}.partial")), group)
        save(draft.pieces, draft_folder, group)
        digests = everywhere(
            lambda: {path.name: digest(path) for path in draft_folder.glob(f"__{world.rank}_*")}, group
        )

        def conclude() -> None:
            sizes = {name: each.nbytes for name, each in stored(draft_folder).items()}
            facts = json.loads(draft.facts) | {"learners": registry(sizes, self.run)}
            texts = {STATE: json.dumps(facts), CONFIG: self.config, **tokeniser_file(self.run.data.sources[0].path)}
            for name, text in texts.items():
                write_durably(draft_folder / name, text)
            files = {name: each for mine in digests for name, each in mine.items()}
            files |= {name: digest(draft_folder / name) for name in (".metadata", *texts)}
            write_durably(draft_folder / MANIFEST, json.dumps({"step": draft.step, "files": files}, indent=1))
            with self.hold.committing():
                commit(draft_folder, final)
                self.prune()

        led(world, conclude, group)

    def refused(self, draft: Draft, error: BaseException) -> None:
        """Says what a save that failed needed and found."""
        mine = sum(values.nbytes for each in draft.pieces.values() if each.owner for _, values in each.rectangles)
        need, place = sum(everywhere(lambda: mine, self.group)), self.folder.path / "checkpoints"
        free = shutil.disk_usage(place).free
        failures = [str(each) for each, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        reason = (failures or [str(error)])[0]
        if self.world.leads:
            self.clean()
        self.journal.event("save failed", draft.step, reason=reason, need=need, free=free)
        self.journal.say(
            f"step {draft.step} could not be saved in {place}: {reason}; it needs {need / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} are free; the last good checkpoint stands, and the next save tries again"
        )

    def prune(self) -> None:
        """Removes all but the newest checkpoints and those at every `keep_every` steps, and what killed saves left."""
        for step in surplus(self.folder.steps(), self.settings):
            target = self.folder.checkpoint(step)
            target.rename(target.with_name("." + target.name + ".partial"))  # half removed, it must not look whole
        self.clean()

    def clean(self) -> None:
        """Removes what saves and removals that never came to their end left behind."""
        for leftover in (self.folder.path / "checkpoints").glob(".step-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def restore(self, state: TrainState) -> bool:
        """Takes over the newest good checkpoint; False where the run has none. A collective.

        Raises UserError for a checkpoint of another model or dataset, StoppedOnPurpose where all are damaged.
        """
        led(state.world, self.clean)
        newest = self.newest(state.world)
        if self.remote is not None and led(state.world, partial(self.remote.fetch, newest), self.group):
            newest = self.newest(state.world)
        if newest is not None:
            apply(state, self.folder.checkpoint(newest), self.journal)
            led(state.world, self.prune)  # what a killed save left to do
            return True
        if count := led(state.world, lambda: len(self.folder.damaged())):
            raise StoppedOnPurpose(
                f"none of the {count} checkpoints in {self.folder.path} is good; remove checkpoints/damaged-* to start anew"
            )
        return False

    def newest(self, world: World) -> int | None:
        """Step of the newest good checkpoint; those that are damaged are set aside. A collective."""
        return next((step for step in led(world, self.folder.steps) if self.good(step, world)), None)

    def roll_back(self, state: TrainState) -> int | None:
        """Takes over the newest good checkpoint before this step, but for the place in the data. A collective.

        Gives its step; None where there is none that is of the same levels and data.
        """
        state.optimizer.arrive()
        now = (state.identity(), state.fingerprints)
        self.settle()
        for step in led(state.world, self.folder.steps):
            if step < state.step and self.good(step, state.world):
                facts = json.loads((self.folder.checkpoint(step) / STATE).read_text())
                if (facts["identity"], facts["data"]) != now:
                    return None
                for policy in state.open_sums():  # what is closed in the checkpoint must be empty here
                    for fragment in policy.open():
                        fragment.values["window"].zero_()
                apply(state, self.folder.checkpoint(step), self.journal, rows=False)
                return int(step)
        return None

    def good(self, step: int, world: World) -> bool:
        """Whether every file matches its digest; a damaged checkpoint is said and set aside. A collective."""
        path = self.folder.checkpoint(step)
        faults = [fault for each in everywhere(lambda: verify(path, world.rank, world.size)) for fault in each]
        if not faults:
            return True
        self.journal.event("damaged checkpoint", step, faults=faults)
        self.journal.say(f"checkpoint of step {step} is damaged ({faults[0]}); trying the one before")
        led(world, lambda: path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}")))
        return False
