"""The run folder: where everything of a run lies. Readable without torch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from nlscale.config.errors import UserError, require

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
STATE = "train_state.json"


@dataclass(frozen=True)
class Folder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved run; itself a recipe."""
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Starts, stops, saves, faults."""
        return self.path / "events.jsonl"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.path / "plots" / "loss.png"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step`."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, newest first. One without a manifest does not exist."""
        found = (self.path / "checkpoints").glob(f"step-{'[0-9]' * 8}/{MANIFEST}")
        return sorted((int(path.parent.name.removeprefix("step-")) for path in found), reverse=True)

    @property
    def newest(self) -> int:
        """Step of the newest checkpoint; 0 where there is none."""
        return next(iter(self.steps()), 0)

    def chosen(self, step: int | None) -> int:
        """A step with a committed checkpoint, None: the newest; raises UserError where there is none."""
        steps = self.steps()
        require(bool(steps), f"{self.path} has no checkpoint")
        step = steps[0] if step is None else step
        require(step in steps, f"{self.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return step

    def damaged(self) -> list[Path]:
        """Checkpoints that were found damaged and set aside."""
        return sorted((self.path / "checkpoints").glob("damaged-step-*"))

    def attempts(self) -> list[Path]:
        """Log folders of all starts, oldest first."""
        return sorted((self.path / "logs").glob("[0-9]*"), key=lambda path: int(path.name))

    def open(self) -> Path:
        """Makes the folder and a log folder for a new start, and gives the latter; raises UserError where it cannot."""
        try:
            for name in ("checkpoints", "plots", "logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            attempts = self.attempts()
            logs = self.path / "logs" / str(int(attempts[-1].name) + 1 if attempts else 1)
            logs.mkdir()
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error.strerror}") from None
        return logs


def write_durably(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and on disk when this returns."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def read_json(path: Path) -> dict:
    """A file's content; empty where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def read_lines(path: Path) -> list[dict]:
    """Records of a JSON-lines file; a last line that a crash cut short is left out."""
    records = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records
