"""`nlscale logs`: what a run's job and ranks say, labelled, as it stands or as it comes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nlscale.runtime.folder import Folder

PAUSE, LOOK = 0.3, 5.0  # seconds between looks at files, and at whether the run still goes on


@dataclass
class Follower:
    """The files of a run's newest attempt, and how far each was read."""

    folder: Folder
    ranks: str = "0"  # a number, or all
    attempt: int | None = None
    read: dict[Path, int] = field(default_factory=dict)

    def sources(self) -> list[tuple[str, Path]]:
        """Labels and files: the job's output, then ranks of the newest attempt that has any: a start may be refused."""
        attempts = [path for path in self.folder.attempts() if self.attempt in (None, int(path.name))]
        outputs = sorted((self.folder.path / "slurm").glob("*.out"), key=lambda path: path.stat().st_mtime)
        found = [(f"job {path.stem}", path) for path in outputs[-1:]]
        which = "rank-*.log" if self.ranks == "all" else f"rank-{int(self.ranks):05d}.log"
        heard = next((paths for each in reversed(attempts) if (paths := sorted(each.glob(which)))), [])
        return found + [(f"{path.parent.name}/rank {int(path.stem.removeprefix('rank-'))}", path) for path in heard]

    def new(self) -> Iterator[str]:
        """Whole lines that have not been given yet."""
        for label, path in self.sources():
            with path.open("rb") as file:
                file.seek(self.read.get(path, 0))
                whole, _, _ = file.read().rpartition(b"\n")
            if whole:
                self.read[path] = self.read.get(path, 0) + len(whole) + 1
                yield from (f"{label} | {line}" for line in whole.decode(errors="replace").split("\n"))


def follow(follower: Follower, going_on: Callable[[], bool]) -> Iterator[str]:
    """Lines as they come, until the run no longer goes on."""
    while True:
        alive, looked = going_on(), time.monotonic()
        while time.monotonic() < looked + LOOK:
            yield from follower.new()
            if not alive:
                return
            time.sleep(PAUSE)
