"""Damaged shards and indexes: named where they are touched, never a silently different token."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlscale.cli import main
from nlscale.config.cluster import Cluster
from nlscale.config.data import Data
from nlscale.config.errors import UserError
from nlscale.config.parallel import Parallel
from nlscale.config.run import Run
from nlscale.data.batch import token_hash
from nlscale.data.loader import Loader, collate
from nlscale.data.rows import VOID, open_rows
from nlscale.data.verify import verify
from nlscale.data.write import Preparation, prepare
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.world import World, join
from nlscale.testing import ranks
from nlscale.train import loop
from tests.corpus import LEVELS, MODEL, REST, TRAIN, small_run, write_corpus
from tests.faults import flip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of some tens of shards."""
    root = tmp_path_factory.mktemp("shards")
    source = write_corpus(root / "in", documents=200)
    names = {"sources": (str(source),), "out": str(root / "out"), "tokeniser": "bytes"}
    prepare(Preparation(sequence=32, held_out=0.1, shard_bytes=2**12, **names))
    assert len(list((root / "out" / "train").rglob("*.mds"))) > 20
    return root / "out"


def every_row(
    folder: Path, damaged: str, found: Callable[[str], None] = print, world: World | None = None
) -> np.ndarray:
    """All training rows, in their order."""
    world = world or join(Parallel(), Cluster(), 0)
    dataset = open_rows(Data(path=str(folder), sequence=32, damaged=damaged), "train", world, 1, False, found)  # type: ignore[arg-type]
    return collate([dataset[i] for i in range(dataset.num_samples)])


def flipped(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Bits flipped one at a time at random places of the shards: how many stopped the reader with the shard's name,
    and how many left, in quarantine, all other rows and only these.
    """
    world = join(Parallel(), Cluster(), 0)
    chance, whole = random.Random(seed), every_row(folder, "stop", print, world)
    targets = sorted((folder / "train").rglob("*.mds"))
    stopped, left = 0, 0
    for _ in range(count):
        target = chance.choice(targets)
        before = target.read_bytes()
        flip(target, chance)
        try:
            every_row(folder, "stop", print, world)
        except UserError as error:
            stopped += f"{target}: digest differs" in str(error) and "(sample " in str(error)
        said: list[str] = []
        rows = every_row(folder, "quarantine", said.append, world)
        void = rows[:, 0] == VOID
        named = len(said) == 1 and str(target) in said[0] and f"its {void.sum()} rows" in said[0]
        left += named and 0 < void.sum() < len(void) / 5 and np.array_equal(rows[~void], whole[~void])
        target.write_bytes(before)
    assert np.array_equal(every_row(folder, "stop", print, world), whole)
    return stopped, left


def test_flipped_bits_of_shards_stop_the_reader_or_are_left_out(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    assert ranks(1, flipped, copy, 12, 1) == [(12, 12)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_flipped_bits_of_shards(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    for seed in range(10):  # streaming keeps its shared memory until a process ends
        assert ranks(1, flipped, copy, 10, 2 + seed) == [(10, 10)]
    print("\n100 flipped bits of data shards: 100 stopped a reader, 100 left in quarantine all other rows as they were")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(("what", "words"), [(cut, "bytes, should be"), (Path.unlink, "missing")])
def test_a_shard_that_is_cut_or_gone_is_named(shards: Path, tmp_path: Path, what: Any, words: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    target = sorted((copy / "train").rglob("*.mds"))[3]
    what(target)
    with pytest.raises(RuntimeError, match=rf"{target.name}: .*{words}"):
        ranks(1, every_row, copy, "stop")


def spoiled_index(copy: Path, change: Callable[[list[dict]], object]) -> Path:
    index = copy / "train" / "index.json"
    content = json.loads(index.read_text())
    change(content["shards"])
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shards: shards.pop(), "rows, the card says"),
        (lambda shards: shards[0]["raw_data"].update(basename="../../other.mds"), "leads out of it"),
        (lambda shards: shards[0]["raw_data"].update(basename="/etc/passwd"), "leads out of it"),
        (lambda shards: shards[0]["raw_data"]["hashes"].update(xxh128="0" * 32), "fingerprint does not match"),
        (lambda shards: shards[0].clear(), "index.json: 'raw_data'"),
    ],
)
def test_an_index_that_is_not_the_cards_is_refused(shards: Path, tmp_path: Path, change: Any, words: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    assert verify(str(copy)) == []
    spoiled_index(copy, change)
    with pytest.raises(RuntimeError, match=words):
        ranks(1, every_row, copy, "stop")
    assert words in "\n".join(verify(str(copy)))


def test_a_run_stops_or_goes_on_without_the_shard(shards: Path, tmp_path: Path) -> None:
    """Loss, targets and hash of a run in quarantine are those of the rows that are left."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    small = ["train.steps=30", "model.layers=1", "train.global_batch=16"]
    for target in sorted((copy / "train").rglob("*.mds"))[::6]:
        flip(target, random.Random(1))
    run = small_run(str(copy), tmp_path / "run", *small)
    with pytest.raises(RuntimeError, match=r"digest differs.*data\.damaged=quarantine goes on"):
        ranks(2, loop.train, run)
    run = small_run(str(copy), tmp_path / "run", *small, "data.damaged=quarantine")
    ranks(2, loop.train, run)
    folder = Folder(Path(run.folder))
    faults = {line["fault"] for line in read_lines(folder.events) if line["event"] == "damaged shard"}
    assert 1 <= len(faults) <= len(list((copy / "train").rglob("*.mds"))[::6])
    lines = [line for line in read_lines(folder.metrics) if "train/loss" in line]
    assert len(lines) == 30 and all(np.isfinite(line["train/loss"]) for line in lines)
    expected = ranks(1, targets_and_hashes, run)[0]
    assert [line["data/token_hash"] for line in lines] == [each for _, each in expected]
    tokens = np.diff([0] + [line["tokens"] for line in lines])
    assert list(tokens) == [count for count, _ in expected] and min(tokens) < 16 * 32


def targets_and_hashes(run: Run) -> list[tuple[int, int]]:
    loader = Loader(run.data, 16, join(Parallel(), Cluster(), 0))
    steps = [next(loader) for _ in range(30)]
    return [(32 * int((rows[:, 0] != VOID).sum()), token_hash(rows)) for rows in steps]


def test_the_program_says_which_shard_and_ends_with_78(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where it was not rank 0 that met it."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    for target in (copy / "train").rglob("*.mds"):
        cut(target)
    asked = [LEVELS, *MODEL, *TRAIN, *REST, f"data.path={copy}", f"run.folder={tmp_path / 'run'}"]
    assert main(["train", "demo", *asked, "--nproc", "2"]) == 78
    said = capfd.readouterr().err
    assert "bytes, should be" in said and "restore the file, or data.damaged=quarantine" in said


def test_steps_whose_rows_are_all_void_move_nothing(shards: Path, tmp_path: Path) -> None:
    """Rows in order, so that a shard that is gone fills whole steps; weights stand still there, and the run goes on."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    index = json.loads((copy / "train" / "index.json").read_text())["shards"]
    (copy / "train" / index[1]["raw_data"]["basename"]).unlink()
    first, gone = index[0]["samples"], index[1]["samples"]
    small = ["train.global_batch=4", "model.layers=1", "data.shuffle=false", f"train.steps={(first + gone) // 4 + 6}"]
    run = small_run(str(copy), tmp_path / "stop", *small)
    with pytest.raises(RuntimeError, match=r"missing \(sample \d+ was asked for\)"):
        ranks(2, loop.train, run)
    run = small_run(str(copy), tmp_path / "run", *small, "data.damaged=quarantine")
    ranks(2, loop.train, run)
    lines = read_lines(Folder(Path(run.folder)).metrics)
    void = [line["step"] for line in lines if "data/void" in line]
    assert gone // 4 - 1 <= len(void) <= gone // 4 and void == list(range(void[0], void[-1] + 1))
    assert all("train/loss" not in line for line in lines if line["step"] in void) and len(lines) == run.train.steps
    assert all(np.isfinite(line["train/loss"]) for line in lines if line["step"] not in void)
    assert {line["tokens"] for line in lines if line["step"] in void} == {lines[void[0] - 2]["tokens"]}


def with_dead_worker(run: Run) -> None:
    """Trains; the loader's process is killed after five steps."""
    plain = loop.train_step

    def step(state: Any, *rest: Any) -> Any:
        if state.step == 5:
            (worker,) = state.loader.batches._iterator._workers
            os.kill(worker.pid, signal.SIGKILL)
        return plain(state, *rest)

    loop.train_step = step
    loop.train(run)


def test_a_dead_loader_process_is_an_error(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", "model.layers=1", "data.workers=1")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* is killed by signal"):
        ranks(2, with_dead_worker, run)
    assert time.monotonic() - began < 60


def test_data_verify_says_all_faults(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    one, two = sorted((copy / "train").rglob("*.mds"))[:2]
    cut(one)
    two.unlink()
    assert main(["data", "verify", str(copy)]) == 78
    said = capsys.readouterr().err
    assert "bytes, should be" in said and two.name in said and "missing" in said
