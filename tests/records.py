"""What a run left in its folder."""

import json
from pathlib import Path
from typing import Any

from nlscale.config.run import Run
from nlscale.runtime.folder import Folder, read_lines


def lines(run: Run) -> list[dict[str, Any]]:
    """Records of its steps."""
    return [line for line in read_lines(Folder(Path(run.folder)).metrics) if "train/loss" in line]


def losses(run: Run) -> list[float]:
    return [line["train/loss"] for line in lines(run)]


def hashes(run: Run) -> list[int]:
    """Of the tokens of each step."""
    return [line["data/token_hash"] for line in lines(run)]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(Folder(Path(run.folder)).events) if line["event"] == kind]


def shards(run: Run, step: int) -> dict[str, dict[str, Any]]:
    """Sizes and digests of a checkpoint's shards: every master weight, moment and open window of every rank."""
    files = json.loads((Folder(Path(run.folder)).checkpoint(step) / "manifest.json").read_text())["files"]
    return {name: facts for name, facts in files.items() if name.endswith(".distcp")}
