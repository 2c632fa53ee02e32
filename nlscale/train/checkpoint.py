"""Checkpoints: shards, then train_state.json, then a manifest of sizes and digests, then one rename.

A folder without a manifest does not exist for anyone. Nothing is applied before its digest was checked; a damaged
checkpoint is passed over for the newest good one, aloud; a run never starts from scratch while any is there.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint import CheckpointException

from nlscale.config.errors import StoppedOnPurpose, UserError
from nlscale.config.read import dump
from nlscale.config.train import Checkpoint
from nlscale.runtime.folder import MANIFEST, STATE, Folder, write_durably
from nlscale.runtime.holder import Hold
from nlscale.runtime.log import Journal
from nlscale.train.agree import everywhere, led
from nlscale.train.continual import Change, anchor_new, begin_new, carried, compare, dropped, newly_kept, of_tasks
from nlscale.train.memories import check_memories, memories
from nlscale.train.pieces import Pieces, load, save, stored
from nlscale.train.split import divided, parts_of, redirected
from nlscale.train.state import TrainState
from nlscale.train.windows import load_windows, windows_to_save


class Checkpoints:
    """Saves and restores the state of one run."""

    def __init__(self, folder: Folder, journal: Journal, hold: Hold) -> None:
        self.folder, self.journal, self.hold = folder, journal, hold

    def due(self, state: TrainState) -> bool:
        """Whether the interval ends at this step."""
        return state.step % state.run.checkpoint.interval == 0

    def save(self, state: TrainState) -> bool:
        """Commits the state of this step; nothing to do where it stands already. A collective.

        False where the disk refused: the last good checkpoint stands. Raises StoppedOnPurpose where another attempt has
        taken the run folder over.
        """
        final, began = self.folder.checkpoint(state.step), time.monotonic()
        if led(state.world, (final / MANIFEST).is_file):
            return True
        pieces = {**state.shards(), **windows_to_save(state), **memories(state)}
        try:
            self.write(state, pieces, final)
        except (OSError, CheckpointException) as error:  # the latter is no Exception
            self.refused(state, pieces, error)
            return False
        self.journal.event("save", state.step, seconds=round(time.monotonic() - began, 3))
        return True

    def write(self, state: TrainState, pieces: dict[str, Pieces], final: Path) -> None:
        """Shards, facts, manifest, commit."""
        world = state.world
        partial = led(world, lambda: anew(final.with_name(f".{final.name}.{self.hold.token}.partial")))
        save(pieces, partial)
        facts = state.facts()
        digests = everywhere(lambda: {path.name: digest(path) for path in partial.glob(f"__{world.rank}_*")})

        def conclude() -> None:
            write_durably(partial / STATE, json.dumps(facts))
            write_durably(partial / "config.yaml", dump(state.run))
            files = {name: each for mine in digests for name, each in mine.items()}
            files |= {name: digest(partial / name) for name in (".metadata", STATE, "config.yaml")}
            write_durably(partial / MANIFEST, json.dumps({"step": state.step, "files": files}, indent=1))
            with self.hold.committing():
                commit(partial, final)
                self.prune(state.run.checkpoint)

        led(world, conclude)

    def refused(self, state: TrainState, pieces: dict[str, Pieces], error: BaseException) -> None:
        """Says what a save that failed needed and found."""
        mine = sum(values.nbytes for each in pieces.values() if each.owner for _, values in each.rectangles)
        need, place = sum(everywhere(lambda: mine)), self.folder.path / "checkpoints"
        free = shutil.disk_usage(place).free
        failures = [str(each) for each, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        reason = (failures or [str(error)])[0]
        if state.world.leads:
            self.clean()
        self.journal.event("save failed", state.step, reason=reason, need=need, free=free)
        self.journal.say(
            f"step {state.step} could not be saved in {place}: {reason}; it needs {need / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} are free; the last good checkpoint stands, and the next save tries again"
        )

    def prune(self, settings: Checkpoint) -> None:
        """Removes all but the newest checkpoints and those at every `keep_every` steps, and what killed saves left."""
        every = settings.keep_every
        for step in self.folder.steps()[settings.keep :] if settings.keep else []:
            target = self.folder.checkpoint(step)
            if not every or step % every:
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
        steps, damaged = led(state.world, lambda: (self.folder.steps(), len(self.folder.damaged())))
        for step in steps:
            faults = verify(self.folder.checkpoint(step), state.world.rank, state.world.size)
            everyone: list[list[str]] = [[] for _ in range(state.world.size)]
            dist.all_gather_object(everyone, faults)
            faults = [fault for each in everyone for fault in each]
            if not faults:
                self.load(state, self.folder.checkpoint(step))
                led(state.world, lambda: self.prune(state.run.checkpoint))  # what a killed save left to do
                return True
            self.journal.event("damaged checkpoint", step, faults=faults)
            self.journal.say(f"checkpoint of step {step} is damaged ({faults[0]}); trying the one before")
            self.set_aside(step, state)
        if steps or damaged:
            count = len(steps) + damaged
            raise StoppedOnPurpose(
                f"none of the {count} checkpoints in {self.folder.path} is good; remove checkpoints/damaged-* to start anew"
            )
        return False

    def set_aside(self, step: int, state: TrainState) -> None:
        """Renames a damaged checkpoint, so that it is kept to look at, but neither counted nor in the way. A collective."""
        if state.world.leads:
            path = self.folder.checkpoint(step)
            path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
        dist.barrier()

    def load(self, state: TrainState, path: Path) -> None:
        """Applies a checked checkpoint."""
        facts = json.loads((path / STATE).read_text())
        now = state.identity()
        parts = parts_of(now, facts["identity"], state.run.levels)
        facts["identity"] = divided(facts["identity"], now, parts)
        change = compare(now, facts["identity"], path, state.run.checkpoint.levels == "change")
        moved_on = facts["data"] != state.fingerprints
        if moved_on and state.run.checkpoint.data != "change":
            raise UserError(
                f"{path} was trained on another dataset (fingerprint {' '.join(facts['data'])}, now "
                f"{' '.join(state.fingerprints)}); give the old data.path, another run.name, or checkpoint.data=change "
                "to go on with the new one"
            )
        pieces, there = state.shards() | memories(state), stored(path)
        check_memories({key: each for key, each in pieces.items() if not change or key in there}, there)
        began = newly_kept(state.run.levels, now, there, parts)
        pieces = redirected(pieces, parts, there)
        load({key: each for key, each in pieces.items() if key in there or not (change or of_tasks(key))}, path)
        if change:
            self.report(change, facts)
            facts = carried(facts, change, now)
            begin_new(state.optimizer, change.new, there)
        anchor_new(state.optimizer, there, parts)
        state.apply_facts(facts | {"loader": None} if moved_on else facts)
        state.optimizer.publish()
        load_windows(state, facts["windows"], path)
        self.journal.event("restore", state.step, checkpoint=path.name, layout=facts["layout"])
        kept = state.optimizer.tasks.end([level.name for level in state.run.levels if moved_on or level.name in began])
        if moved_on:
            self.journal.event("data change", state.step, then=facts["data"], now=state.fingerprints)
        if moved_on or kept:
            what = "the data changes" if moved_on else "a task ends"
            self.journal.say(f"{what} at step {state.step}; kept of the task before: {', '.join(kept) or 'nothing'}")

    def report(self, change: Change, facts: dict[str, Any]) -> None:
        """Says what a change of levels means."""
        moved, gone = sorted(set(change.moved.values())), dropped(facts, change)
        self.journal.event("levels change", facts["step"], moved=moved, new=sorted(change.new), windows_dropped=gone)
        windows = f"open windows of {', '.join(gone)} are dropped" if gone else "no open window is dropped"
        parts = [f"{len(change.moved)} parameters move otherwise ({'; '.join(moved)})"] if moved else []
        parts += [f"{len(change.new)} parameters are new"] if change.new else []
        self.journal.say(f"levels change at step {facts['step']}: {', '.join(parts)}; {windows}")


def anew(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(partial: Path, final: Path) -> None:
    """The one rename that makes a checkpoint exist; `latest` is only a hint."""
    if final.exists():  # without a manifest: what a killed removal left
        shutil.rmtree(final)
    partial.rename(final)
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    write_durably(final.parent / "latest", final.name + "\n")


def digest(path: Path) -> dict[str, Any]:
    """Size and xxh3 digest of a file."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            state.update(block)
    return {"bytes": path.stat().st_size, "xxh3": state.hexdigest()}


def verify(path: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files, a line each."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: {error}"]
    faults = []
    for name, expected in sorted(files.items())[rank::ranks]:
        if Path(name).name != name or not (path / name).is_file():
            faults.append(f"{name}: missing")
        elif digest(path / name) != expected:
            faults.append(f"{name}: digest differs")
    return faults
