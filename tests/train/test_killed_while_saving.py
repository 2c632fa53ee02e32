"""SIGKILL at every boundary of a save: what was committed loads, what was not does not exist, the end has the same bits."""

import random
import shutil
from pathlib import Path

import pytest

from nlscale.config.run import Run
from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train.loop import train
from nlscale.train.manifest import verify
from tests.corpus import small_run
from tests.faults import attempt, flip, train_until_touch
from tests.records import losses, shards

SMALL = ["train.steps=12", "checkpoint.interval=4", "checkpoint.keep=1", "model.layers=1"]
AFTER = 6  # the second save commits and removes the first


@pytest.fixture(scope="module")
def unbroken(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[int]]:
    """A run that nobody killed, and how often each rank touched its checkpoints from step AFTER on."""
    run = small_run(prepared, tmp_path_factory.mktemp("unbroken"), *SMALL)
    return run, [ranks(2, train_until_touch, run, 0, 0, AFTER)[0], touches_of_one(prepared, tmp_path_factory)]


def touches_of_one(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> int:
    run = small_run(prepared, tmp_path_factory.mktemp("counted"), *SMALL)
    return int(ranks(2, train_until_touch, run, 1, 0, AFTER)[1])


def killed_and_resumed(run: Run, whole: Run, rank: int, at: int) -> None:
    """One place of the sweep."""
    folder = Folder(Path(run.folder))
    assert not attempt(lambda: ranks(2, train_until_touch, run, rank, at, AFTER)), f"touch {at} of rank {rank}"
    saved = folder.steps()
    assert saved and saved[0] >= 4, f"touch {at} of rank {rank} lost more than the steps since the last commit: {saved}"
    assert not any(verify(folder.checkpoint(step)) for step in saved)
    ranks(2, train, run)
    assert shards(run, 12) == shards(whole, 12) and losses(run) == losses(whole), f"touch {at} of rank {rank}"
    assert folder.steps() == [12] and not list((folder.path / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("rank", "share"), [(0, 0.3), (0, 0.45), (0, 0.83), (1, 0.5)])
def test_killed_at_some_boundaries(
    rank: int, share: float, unbroken: tuple[Run, list[int]], prepared: str, tmp_path: Path
) -> None:
    """Two places in the second save, one in what the last one removes, one of the other rank; `make faults` has all."""
    whole, counts = unbroken
    assert counts[0] > 60 > counts[1] > 5
    at = 1 + int(share * counts[rank])
    killed_and_resumed(small_run(prepared, tmp_path / "run", *SMALL), whole, rank, at)
    assert (tmp_path / "run" / "config.yaml").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_every_boundary(unbroken: tuple[Run, list[int]], prepared: str, tmp_path: Path) -> None:
    whole, counts = unbroken
    places = [(rank, at) for rank, count in enumerate(counts) for at in range(1, count + 1)]
    for rank, at in places:
        run = small_run(prepared, tmp_path / f"{rank}-{at}", *SMALL)
        killed_and_resumed(run, whole, rank, at)
        shutil.rmtree(run.folder)
    print(f"\nkilled at {len(places)} boundaries of two saves: {counts[0]} of rank 0, {counts[1]} of rank 1")
    assert len(places) == sum(counts)


def flipped(run: Run, count: int, seed: int) -> None:
    """A bit flipped at so many random places of a checkpoint, one at a time: each is seen before anything is applied."""
    folder, chance = Folder(Path(run.folder)), random.Random(seed)
    path = folder.checkpoint(folder.steps()[0])
    files = [file for file in sorted(path.iterdir()) for _ in range(1 + file.stat().st_size // 2**14)]
    assert verify(path) == []
    for _ in range(count):
        target = chance.choice(files)
        before = target.read_bytes()
        place = flip(target, chance)
        assert verify(path) != [], place
        target.write_bytes(before)
    assert verify(path) == []


def test_a_flipped_bit_is_seen(unbroken: tuple[Run, list[int]]) -> None:
    flipped(unbroken[0], 30, 1)
    assert verify(Folder(Path(unbroken[0].folder)).checkpoint(12)) == []


@pytest.mark.slow
def test_a_hundred_flipped_bits_are_seen(unbroken: tuple[Run, list[int]]) -> None:
    flipped(unbroken[0], 100, 2)
    assert verify(Folder(Path(unbroken[0].folder)).checkpoint(12)) == []
    print("\n100 flipped bits of a checkpoint: 100 seen")
