"""Records on disks that fill, wandb that cannot be reached, secrets that stay where they are."""

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from nlscale.config.errors import UserError
from nlscale.config.run import Run
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.log import Journal, Lines
from nlscale.testing import ranks
from nlscale.train import loop, metrics
from tests.corpus import small_run
from tests.records import losses

SMALL = ["model.layers=1", "train.steps=10", "checkpoint.interval=5"]


def test_what_finds_no_room_waits(tmp_path: Path) -> None:
    """/dev/full refuses every byte."""
    (tmp_path / "lines").symlink_to("/dev/full")
    lines = Lines(tmp_path / "lines")
    assert not lines.write({"step": 1}) and not lines.write({"step": 2})
    (tmp_path / "lines").unlink()
    assert lines.write({"step": 3})
    assert [line["step"] for line in read_lines(tmp_path / "lines")] == [1, 2, 3] and not lines.waiting


def test_no_line_is_half_there(tmp_path: Path) -> None:
    """A disk that takes a part of a record."""
    lines = Lines(tmp_path / "lines")
    assert lines.write({"step": 1})

    class Short:
        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 5

        def seek(self, *place: int) -> int:
            return int(self.file.seek(*place))

        def truncate(self, size: int) -> int:
            return int(self.file.truncate(size))

        def write(self, content: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written, self.room = self.file.write(content[: self.room]), 0
            return int(written)

    with (tmp_path / "lines").open("ab", buffering=0) as file, pytest.raises(OSError, match="No space"):
        lines.append(Short(file), b'{"step": 2, "loss": 1.0}\n')
    assert (tmp_path / "lines").read_text() == '{"step": 1}\n'


def refused_between(run: Run, begin: int, end: int) -> None:
    """Trains; records find no room after step `begin`, until after step `end`."""
    plain, folder = loop.train_step, Folder(Path(run.folder))

    def step(state: Any, *rest: Any) -> Any:
        for path in (folder.metrics, folder.events) if state.world.leads else ():
            if state.step == begin:
                path.rename(path.with_suffix(".real"))
                path.symlink_to("/dev/full")
            if state.step == end:
                path.unlink()
                path.with_suffix(".real").rename(path)
        return plain(state, *rest)

    loop.train_step = step
    loop.train(run)


def test_training_goes_on_while_records_find_no_room(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", *SMALL, "train.evaluate_rows=0")
    ranks(2, refused_between, run, 3, 8)
    folder = Folder(Path(run.folder))
    assert [line["step"] for line in read_lines(folder.metrics)] == list(range(1, 11))
    told = [(line["event"], line["step"]) for line in read_lines(folder.events)]
    assert told == [("start", 0), ("save", 5), ("save", 10), ("end", 10)]


def test_a_closed_screen_is_no_reason_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr("sys.stdout", full)
    Journal(Folder(tmp_path), True).say("a line")
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space"):  # it was tried
        full.close()


SECRET = "nlscale0" * 5  # of a key's form


def with_wandb(run: Run, url: str) -> None:
    """Trains with a key in the environment, against a server that is not there."""
    os.environ.update(WANDB_API_KEY=SECRET, WANDB_BASE_URL=url, WANDB_DIR=run.folder)
    metrics.REACHED = 4
    loop.train(run)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_where_wandb_cannot_be_reached_the_run_is_kept_for_later(prepared: str, tmp_path: Path) -> None:
    """Offline, under the id that is in the checkpoint; the key is in nothing that the run wrote."""
    run = small_run(prepared, tmp_path / "run", *SMALL, "log.wandb=online")
    ranks(1, with_wandb, run, "http://127.0.0.1:9")
    folder = Folder(Path(run.folder))
    failed = [line for line in read_lines(folder.events) if line["event"] == "wandb failed"]
    assert len(failed) == 1 and failed[0]["mode"] == "online"
    assert len(read_lines(folder.metrics)) == 10
    kept = list((folder.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 1 and kept[0].stat().st_size > 1000
    content = everything(folder.path)
    assert len(content) > 10_000 and SECRET.encode() not in content


class Heard:
    """A wandb run that keeps what it is told."""

    def __init__(self) -> None:
        self.id, self.lines = "heard", list[dict[str, Any]]()

    def log(self, line: dict[str, Any], step: int) -> None:
        assert step == line["step"]
        self.lines.append(dict(line))

    def finish(self, exit_code: int) -> None:
        self.lines.append({"exit": exit_code})


def heard(run: Run) -> list[dict[str, Any]]:
    """What a run tells wandb."""
    told = Heard()
    metrics.Metrics._open_wandb = lambda self: told  # type: ignore[method-assign]
    loop.train(run)
    return told.lines


def test_wandb_hears_every_line_of_metrics_the_goodput_of_saves_among_them(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", *SMALL, "log.wandb=offline")
    folder = Folder(Path(run.folder))
    folder.open()
    Lines(folder.events).write({"event": "attempt", "time": time.time(), "attempt": 1})
    *lines, last = ranks(1, heard, run)[0]
    assert last == {"exit": 0} and lines == read_lines(folder.metrics)
    goodput = [line for line in lines if "goodput/share" in line]
    assert len(goodput) == 2 and all(line["goodput/productive_seconds"] > 0 for line in goodput)
    assert {"goodput/recomputed_seconds", "goodput/restart_seconds"} <= goodput[-1].keys()


def history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, values) of every record of history in a file of wandb's, a log of LevelDB's form."""
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # no header is cut by a block's end
            place += 2**15 - place % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record, place = record + content[place + 7 : place + 7 + size], place + 7 + size
        if kind in (1, 4):  # whole, or the last part
            said, record = wandb_internal_pb2.Record.FromString(record), b""
            if said.WhichOneof("record_type") == "history":
                values = {item.key or "/".join(item.nested_key): item.value_json for item in said.history.item}
                yield said.history.step.num, {key: json.loads(value) for key, value in values.items()}


def test_attempts_of_a_run_are_one_curve_to_wandb(prepared: str, tmp_path: Path) -> None:
    """Under one id, each step once and under its own number; a save's goodput is of its step."""
    for stop in (3, 10):
        run = small_run(prepared, tmp_path / "run", *SMALL, "log.wandb=offline", f"train.stop_at={stop}")
        ranks(1, loop.train, run)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    told = [record for file in files for record in history(file)]
    assert len(files) == 2 and len({file.name for file in files}) == 1
    assert [step for step, _ in told] == [line["step"] for _, line in told] == list(range(1, 11))
    assert [line["train/loss"] for _, line in told] == losses(run)


@pytest.mark.parametrize("name", ["NLSCALE_SECRET", "AWS_SECRET_ACCESS_KEY", "${oc.env:A}", "wandb_api_key"])
def test_a_secret_of_the_environment_is_not_taken_into_a_run(name: str, prepared: str, tmp_path: Path) -> None:
    """An interpolation would write it to config.yaml; a path may be had so."""
    with pytest.raises(UserError, match="would be written to config.yaml"):
        small_run(prepared, tmp_path / "run", f"log.project=${{oc.env:{name},none}}")
    assert small_run(prepared, tmp_path / "run", "log.project=${oc.env:HOME}").log.project == os.environ["HOME"]


def test_rows_that_follow_one_another_are_not_left_out(prepared: str, tmp_path: Path) -> None:
    asked = ["model.reset=never", "model.mixer=titans", "model.titans.chunk=8", "data.shuffle=false"]
    assert small_run(prepared, tmp_path / "run", *asked).data.damaged == "stop"
    with pytest.raises(UserError, match=r"model\.reset=never needs data\.damaged=stop"):
        small_run(prepared, tmp_path / "run", *asked, "data.damaged=quarantine")


@pytest.mark.parametrize("name", ["../recipes/demo", "../../setup", "/etc/passwd"])
def test_a_section_file_is_a_shipped_one(name: str, prepared: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"use\.levels=.*: choose from"):
        small_run(prepared, tmp_path / "run", f"use.levels={name}")
