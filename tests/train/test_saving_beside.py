"""Saves beside training: the same bits as saves that the run waits for, never two at once, no error lost."""

import io
import json
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from nlscale.config.errors import StoppedOnPurpose, UserError
from nlscale.config.run import Run
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.holder import this_process
from nlscale.testing import ranks
from nlscale.train import checkpoint, loop, remote
from nlscale.train.beside import Beside, Staging
from nlscale.train.manifest import digest, verify
from nlscale.train.pieces import LoadPieces, Pieces, Reader, stored
from tests.corpus import small_run
from tests.faults import flip
from tests.records import events, shards

SMALL = ["train.steps=12", "checkpoint.interval=4", "checkpoint.keep=0", "model.layers=1"]


def disturbed(run: Run, change: Callable[[], None]) -> str:
    """Trains after a change to this process; what it ended with."""
    change()
    try:
        loop.train(run)
    except (UserError, StoppedOnPurpose) as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def slow_writer() -> None:
    """Writing takes until the run has gone on, and never happens twice at once."""
    plain, one = checkpoint.save, threading.Lock()

    def save(*arguments: Any) -> None:
        assert one.acquire(blocking=False)
        time.sleep(0.8)
        plain(*arguments)
        one.release()

    checkpoint.save = save  # type: ignore[assignment]


def test_what_is_written_beside_is_the_state_of_its_step(prepared: str, tmp_path: Path) -> None:
    """The writer starts long after the next steps have changed every tensor; open windows and moments are in it."""
    beside, waited = (small_run(prepared, tmp_path / name, *SMALL) for name in ("beside", "waited"))
    waited = small_run(prepared, tmp_path / "waited", *SMALL, "checkpoint.asynchronous=false")
    assert ranks(2, disturbed, beside, slow_writer) == ["finished"] * 2
    assert ranks(2, disturbed, waited, slow_writer) == ["finished"] * 2
    for step in (4, 8, 12):
        assert shards(beside, step) == shards(waited, step) and len(shards(beside, step)) == 2
        assert verify(Folder(Path(beside.folder)).checkpoint(step)) == []
    there, here = events(beside, "save"), events(waited, "save")
    assert [line["step"] for line in there] == [line["step"] for line in here] == [4, 8, 12]
    assert all(line["stall"] == line["seconds"] > 0.8 for line in here)
    assert there[0]["stall"] < there[0]["seconds"] - 0.5  # the first waits for nothing but the copy


def fenced_after_step_five() -> None:
    """Another attempt takes the run folder over while this one trains."""
    plain = loop.train_step

    def step(state: Any, *rest: Any) -> Any:
        if state.step == 5 and os.environ["RANK"] == "0":
            thief = json.loads((Path(state.run.folder) / "holder.json").read_text())
            thief |= {"token": thief["token"] + 1, "host": "elsewhere"}
            (Path(state.run.folder) / "holder.json").write_text(json.dumps(thief))
        time.sleep(0.05)
        return plain(state, *rest)

    loop.train_step = step


def test_an_error_of_the_writer_ends_the_run_at_the_next_step(prepared: str, tmp_path: Path) -> None:
    """The save of step 8 is fenced: every rank hears of it at a step soon after, not at the save of step 16."""
    run = small_run(prepared, tmp_path / "run", *SMALL, "train.steps=60", "checkpoint.interval=8")
    (one, two) = ranks(2, disturbed, run, fenced_after_step_five)
    assert one == two and "StoppedOnPurpose" in one and "has taken" in one
    lines = [line["step"] for line in read_lines(Folder(Path(run.folder)).metrics)]
    assert 8 <= lines[-1] < 16 and Folder(Path(run.folder)).steps() == []
    assert this_process(1).host != "elsewhere"


def test_staging_keeps_one_copy_and_no_more() -> None:
    staging, values = Staging(), torch.arange(6.0).reshape(2, 3)
    first = staging.copies(
        {"a": Pieces((2, 3), [((0, 0), values)], True), "b": Pieces((2, 3), [((0, 0), values)], False)}
    )
    kept = first["a"].rectangles[0][1]
    assert torch.equal(kept, values) and kept.data_ptr() != values.data_ptr() and first["b"].rectangles == []
    values += 1
    again = staging.copies({"a": Pieces((2, 3), [((0, 0), values)], True)})["a"].rectangles[0][1]
    assert again.data_ptr() == kept.data_ptr() and torch.equal(again, values)
    staging.copies({"c": Pieces((3,), [((0,), torch.ones(3))], True)})
    assert list(staging.held) == [("c", 0)]


def test_an_error_beside_is_raised_once() -> None:
    beside = Beside(torch.device("cpu"))
    beside.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        beside.settle()
    beside.settle()
    assert not beside.failed


def test_saves_are_sent_and_fetched(prepared: str, tmp_path: Path) -> None:
    """A run whose machine is lost goes on elsewhere, with the same bits; the newest that is damaged there is passed over."""
    place = tmp_path / "store"
    upload = f"checkpoint.upload=file://{place}"
    run = small_run(prepared, tmp_path / "run", *SMALL, upload, "checkpoint.keep=2", "train.stop_at=8")
    ranks(2, loop.train, run)
    there = place / "demo"
    assert sorted(path.name for path in there.iterdir()) == ["step-00000004", "step-00000008"]
    assert verify(there / "step-00000008") == [] and [line["step"] for line in events(run, "upload")] == [4, 8]
    elsewhere = small_run(
        prepared, tmp_path / "elsewhere", *SMALL, upload, "checkpoint.keep=1", "checkpoint.keep_every=4"
    )
    ranks(2, loop.train, elsewhere)
    assert [line["step"] for line in events(elsewhere, "fetch")] == [8]
    assert (
        len(list(there.iterdir())) == 3
    )  # what `keep_every` keeps is kept there, too, though the new folder never had it
    whole = small_run(prepared, tmp_path / "whole", *SMALL)
    ranks(2, loop.train, whole)
    assert shards(elsewhere, 12) == shards(whole, 12)
    (shard, *_) = sorted((there / "step-00000012").glob("*.distcp"))
    flip(shard, random.Random(3))
    third = small_run(prepared, tmp_path / "third", *SMALL, upload)
    ranks(2, loop.train, third)
    assert [line["step"] for line in events(third, "damaged checkpoint")] == [12]
    assert [line["step"] for line in events(third, "fetch")] == [8] and shards(third, 12) == shards(whole, 12)


def test_a_damaged_newest_is_fetched_anew_and_no_other_run_is(prepared: str, tmp_path: Path) -> None:
    upload = f"checkpoint.upload=file://{tmp_path}/store"
    run = small_run(prepared, tmp_path / "run", *SMALL, upload, "train.stop_at=8")
    ranks(2, loop.train, run)
    for step in (4, 8):
        flip(sorted(Folder(Path(run.folder)).checkpoint(step).glob("*.distcp"))[0], random.Random(step))
    ranks(2, loop.train, small_run(prepared, tmp_path / "run", *SMALL, upload))
    assert [line["step"] for line in events(run, "fetch")] == [8]
    assert [line["step"] for line in events(run, "restore")] == [8]
    other = small_run(prepared, tmp_path / "other", *SMALL, upload, "run.name=other", "train.stop_at=4")
    ranks(2, loop.train, other)
    assert events(other, "fetch") == [] and len(list((tmp_path / "store" / "demo").iterdir())) == 3


def unreachable() -> None:
    """A storage whose library gives up."""

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError("no route to host")

    for name in ("glob", "put_file", "makedirs", "exists"):
        setattr(type(remote.fsspec.filesystem("file")), name, refuse)


def test_a_storage_that_cannot_be_reached(prepared: str, tmp_path: Path) -> None:
    """A run goes on without it; one that has nothing here does not begin anew unasked."""
    upload = f"checkpoint.upload=file://{tmp_path}/store"
    run = small_run(prepared, tmp_path / "run", *SMALL, upload)
    (said, _) = ranks(2, disturbed, run, unreachable)
    assert said.startswith("UserError") and "cannot be asked for checkpoints" in said and "no route to host" in said
    ranks(2, loop.train, small_run(prepared, tmp_path / "run", *SMALL, "train.stop_at=4"))
    assert ranks(2, disturbed, run, unreachable) == ["finished"] * 2
    assert [line["step"] for line in events(run, "upload failed")] == [8, 12]
    assert Folder(Path(run.folder)).steps() == [12, 8, 4]


def test_bytes_in_place_of_a_tensor_are_not_unpickled(prepared: str, tmp_path: Path) -> None:
    """torch would take them for whatever was pickled."""
    run = small_run(prepared, tmp_path / "run", *SMALL, "train.stop_at=4")
    ranks(1, loop.train, run)
    path = Folder(Path(run.folder)).checkpoint(4)
    facts = Reader(path).read_metadata()
    facts.state_dict_metadata["weights/embed.weight"] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(facts))
    with pytest.raises(StoppedOnPurpose, match="BytesStorageMetadata has no place"):
        Reader(path).read_metadata()
    with pytest.raises(StoppedOnPurpose, match="is no tensor"):
        LoadPieces().load_bytes(ReadItem(*[MetadataIndex("weights/embed.weight")] * 6), io.BytesIO())
    del facts.state_dict_metadata["weights/embed.weight"]
    place = next(iter(facts.storage_data.values()))
    place.relative_path = "../" + place.relative_path
    (path / ".metadata").write_bytes(pickle.dumps(facts))
    with pytest.raises(StoppedOnPurpose, match="leads out of its folder"):
        Reader(path).read_metadata()


class Foreign:
    """What a pickle can do to who reads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_foreign_pickle_is_not_run(prepared: str, tmp_path: Path) -> None:
    """A checkpoint with whatever in its .metadata, and a manifest that says so."""
    run = small_run(prepared, tmp_path / "run", *SMALL, "train.stop_at=4")
    ranks(1, loop.train, run)
    path = Folder(Path(run.folder)).checkpoint(4)
    assert len(stored(path)) > 20
    (path / ".metadata").write_bytes(pickle.dumps(Foreign(tmp_path / "was-here")))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][".metadata"] = digest(path / ".metadata")
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert verify(path) == []
    (said,) = ranks(1, disturbed, run, lambda: None)
    assert "StoppedOnPurpose" in said and "posix.mkdir has no place in a checkpoint" in said
    assert not (tmp_path / "was-here").exists()
    pickle.loads((path / ".metadata").read_bytes())  # what torch would have done
    assert (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/run",
        "https://user@host/run",
        "simplecache::s3://key:secret@bucket/run",
        "https://h/p?token=x",
    ],
)
def test_a_key_in_the_config_is_refused(url: str, prepared: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keys belong in the environment"):
        small_run(prepared, tmp_path / "run", f"checkpoint.upload={url}")
