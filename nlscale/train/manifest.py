"""A checkpoint's folder: shards, then facts, then a manifest of sizes and digests, then one rename that makes it exist."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from nlscale.config.train import Checkpoint
from nlscale.runtime.folder import MANIFEST, write_durably


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
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**18))  # small enough for a core's cache
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            state.update(buffer[:count])
    return {"bytes": path.stat().st_size, "xxh3": state.hexdigest()}


def verify(path: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files, a line each."""
    try:
        told = json.loads((path / MANIFEST).read_text())
        files, step = told["files"], told["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: {error}"]
    another = path.name.startswith("step-") and int(path.name.removeprefix("step-")) != step
    faults = [f"{MANIFEST}: it is of step {step}"] if another and rank == 0 else []
    for name, expected in sorted(files.items())[rank::ranks]:
        if Path(name).name != name or not (path / name).is_file():
            faults.append(f"{name}: missing")
        elif digest(path / name) != expected:
            faults.append(f"{name}: digest differs")
    return faults


def surplus(steps: Sequence[int], settings: Checkpoint) -> list[int]:
    """Of the steps of checkpoints, newest first: those that the settings do not keep."""
    every = settings.keep_every
    return [step for step in steps[settings.keep :] if settings.keep and (not every or step % every)]
