"""Checkpoints in remote storage: any place that fsspec has a name for, filled after each commit, asked at each start.

A checkpoint exists there once its manifest does, which is sent last. The same are kept there as in the run folder.
"""

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import fsspec
import torch.distributed as dist

from nlscale.config.errors import UserError
from nlscale.config.run import Run
from nlscale.runtime.folder import MANIFEST, Folder
from nlscale.runtime.log import Journal
from nlscale.runtime.world import World
from nlscale.train.agree import everywhere
from nlscale.train.manifest import anew, commit, surplus, verify

Given = TypeVar("Given")


class Remote:
    """The place where a run's checkpoints are kept besides its folder."""

    def __init__(self, run: Run, folder: Folder, journal: Journal, group: dist.ProcessGroup) -> None:
        """In `checkpoint.upload`, under the run's name. Raises UserError where the URL is of no storage known here."""
        self.settings, self.folder, self.journal, self.group = run.checkpoint, folder, journal, group
        self.url, self.sending = f"{run.checkpoint.upload.rstrip('/')}/{run.run.name}", False
        try:
            self.system, self.path = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UserError(f"checkpoint.upload={run.checkpoint.upload}: {error}") from None

    def upload(self, step: int, world: World) -> bool:
        """Sends a committed checkpoint, each rank what it wrote; False where the place refused, which is said."""
        local = self.folder.checkpoint(step)
        target = f"{self.path}/{local.name}"
        self.sending, began = True, time.monotonic()
        try:
            everywhere(lambda: self.begin(target) if world.leads else None, self.group)
            everywhere(lambda: self.send(local, target, share(local, world)), self.group)
            everywhere(lambda: self.conclude(local, target) if world.leads else None, self.group)
        except OSError as error:
            self.journal.event("upload failed", step, reason=str(error))
            self.journal.say(f"step {step} could not be sent to {self.url}: {error}; the next save tries again")
            return False
        finally:
            self.sending = False
        self.journal.event("upload", step, to=self.url, seconds=round(time.monotonic() - began, 3))
        return True

    def begin(self, target: str) -> None:
        """What stood there of the same step is whole no more."""
        if tried(lambda: self.system.exists(f"{target}/{MANIFEST}")):
            tried(lambda: self.system.rm_file(f"{target}/{MANIFEST}"))

    def send(self, local: Path, target: str, names: Iterable[str]) -> None:
        """Copies files of a checkpoint."""
        tried(lambda: self.system.makedirs(target, exist_ok=True))
        for name in names:
            tried(lambda name=name: self.system.put_file(str(local / name), f"{target}/{name}"))  # type: ignore[misc]

    def conclude(self, local: Path, target: str) -> None:
        """The manifest, then the end of those that are kept no longer."""
        self.send(local, target, [MANIFEST])
        for step in surplus(self.steps(), self.settings):
            tried(lambda step=step: self.system.rm(f"{self.path}/step-{step:08d}", recursive=True))  # type: ignore[misc]

    def steps(self) -> list[int]:
        """Steps of the checkpoints there, newest first."""
        found = tried(lambda: self.system.glob(f"{self.path}/step-{'[0-9]' * 8}/{MANIFEST}"))
        return sorted((int(Path(each).parent.name.removeprefix("step-")) for each in found), reverse=True)

    def fetch(self, newest: int | None) -> bool:
        """Whether a good checkpoint newer than the folder's `newest` good one was brought into the run folder.

        Raises UserError where the place cannot be asked and the folder has none: the run would begin anew.
        """
        try:
            return any(self.bring(step) for step in self.steps() if newest is None or step > newest)
        except OSError as error:
            if newest is None:
                raise UserError(
                    f"{self.url} cannot be asked for checkpoints, and the run folder has none: {error}"
                ) from None
            self.journal.say(f"{self.url} cannot be asked for newer checkpoints: {error}")
            return False

    def bring(self, step: int) -> bool:
        """Copies one checkpoint here; False where what came does not match its digests."""
        final = self.folder.checkpoint(step)
        partial = anew(final.with_name(f".{final.name}.fetched.partial"))
        for name in tried(lambda: self.system.ls(f"{self.path}/{final.name}", detail=False)):
            local = partial / Path(name).name
            tried(lambda name=name, local=local: self.system.get_file(name, str(local)))  # type: ignore[misc]
        if faults := verify(partial):
            self.journal.event("damaged checkpoint", step, faults=faults, at=self.url)
            self.journal.say(f"checkpoint of step {step} in {self.url} is damaged ({faults[0]})")
            shutil.rmtree(partial)
            return False
        commit(partial, final)
        self.journal.event("fetch", step, at=self.url)
        self.journal.say(f"fetched the checkpoint of step {step} from {self.url}")
        return True


def share(local: Path, world: World) -> list[str]:
    """Files of a checkpoint that a rank sends: those it wrote, and the first rank what belongs to all."""
    names = sorted(path.name for path in local.iterdir() if path.name != MANIFEST)
    return [
        name for name in names if name.startswith(f"__{world.rank}_") or (world.leads and not name.startswith("__"))
    ]


def tried(action: Callable[[], Given]) -> Given:
    """What `action` gives; whatever a storage's library raises is an OSError."""
    try:
        return action()
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
