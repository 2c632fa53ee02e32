"""Checkpoints whose files are whole, and not where they belong: shards of another step, another step's name, other times."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.records import events


def shard(folder: Folder, step: int) -> Path:
    return sorted(folder.checkpoint(step).glob("*.distcp"))[0]


def swapped(folder: Folder) -> None:
    shutil.copy(shard(folder, 4), shard(folder, 8))


def cut(folder: Folder) -> None:
    os.truncate(shard(folder, 8), shard(folder, 8).stat().st_size // 2)


def renamed(folder: Folder) -> None:
    shutil.rmtree(folder.checkpoint(8))
    shutil.copytree(folder.checkpoint(4), folder.checkpoint(8))


def hinted(folder: Folder) -> None:
    folder.checkpoint(8).with_name("latest").write_text("step-00000004\n")


def unhinted(folder: Folder) -> None:
    folder.checkpoint(8).with_name("latest").write_text("")


def backdated(folder: Folder) -> None:
    """As where hosts' clocks disagree."""
    for path in (folder.checkpoint(8), *folder.checkpoint(8).iterdir()):
        os.utime(path, (1, 1))


CASES: dict[Callable[[Folder], None], int] = {swapped: 4, cut: 4, renamed: 4, hinted: 8, unhinted: 8, backdated: 8}


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_the_newest_that_is_what_it_says_is_taken(
    change: Callable[[Folder], None], prepared: str, tmp_path: Path
) -> None:
    said = ["model.layers=1", "train.steps=10", "checkpoint.interval=4"]
    ranks(1, train, small_run(prepared, tmp_path, *said, "train.stop_at=8"))
    change(Folder(tmp_path))
    run = small_run(prepared, tmp_path, *said)
    ranks(1, train, run)
    assert [line["step"] for line in events(run, "restore")] == [CASES[change]]
    assert len(events(run, "damaged checkpoint")) == (CASES[change] < 8)
