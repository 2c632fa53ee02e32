"""Verbs on a run whose files, or whose targets, are not what they should be: one line and 78, or the line's place."""

import json
from pathlib import Path

import pytest

from nlscale.cli import main
from nlscale.config.read import dump
from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.told import told


@pytest.fixture(scope="module")
def trained(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A run with checkpoints of steps 2 and 4."""
    path = tmp_path_factory.mktemp("trained")
    ranks(1, train, small_run(prepared, path, "model.layers=1", "train.steps=4", "checkpoint.interval=2"))
    return Folder(path)


NOWHERE = {
    "a figure's folder": (
        ["plot", "RUN", "--out", "/proc/no/a.png"],
        "--out /proc/no/a.png: No such file or directory",
    ),
    "a figure's kind": (["plot", "RUN", "--out", "a.xyz"], "--out a.xyz must end in .png"),
    "levels' kind": (["plot", "--levels", "demo", "--out", "a.jpg"], "--out a.jpg must end in .png"),
    "levels of two": (["plot", "--levels", "demo", "optim.lr=1", "x"], "plot --levels draws one recipe, demo, with"),
    "levels of none": (["plot", "no-such", "optim.lr=1"], "no run 'no-such'"),
    "a run's overrides": (
        ["plot", "RUN", "--out", "a.png", "optim.lr=1"],
        "overrides are of `nlscale plot RECIPE --levels`",
    ),
    "a file's folder": (
        ["checkpoint", "convert", "RUN", "--out", "/proc/no/file"],
        "--out /proc/no/file: No such file",
    ),
    "a table's folder": (["status", "RUN", "--json", "/proc/no/x.json"], "--json /proc/no/x.json: No such file"),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_what_cannot_be_written_is_said_in_one_line(case: str, trained: Folder) -> None:
    given, words = NOWHERE[case]
    found = told(*(str(trained.path) if word == "RUN" else word for word in given))
    assert found.code == 78 and not found.out and words in found.err
    assert len([line for line in found.err.splitlines() if "Warning" not in line and "warn(" not in line]) == 1


def test_a_list_goes_on_past_a_damaged_checkpoint(
    trained: Folder, prepared: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained.checkpoint(2) / "train_state.json").write_text('{"step": 2, "tok')
    table = tmp_path / "table.json"
    assert main(["checkpoint", "list", str(trained.path), "--json", str(table)]) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["step", "2", "damaged:"] and f"verify {trained.path}" in first
    assert second.split()[:2] == ["step", "4"] and "tokens" in second and any("moves every" in line for line in rest)
    assert [each["step"] for each in json.loads(table.read_text())["checkpoints"]] == [4]


def test_a_run_without_a_checkpoint_says_so(prepared: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Folder(tmp_path).config.write_text(dump(small_run(prepared, tmp_path)))
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "has no checkpoint yet" in capsys.readouterr().out


def test_a_table_that_was_only_tried_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "gone"), "--json", str(tmp_path / "table.json")]) == 78
    assert "no run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_of_nearly_that_name_is_named(
    prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Folder(Path("runs/first")).path.mkdir(parents=True)
    Folder(Path("runs/first")).config.write_text(dump(small_run(prepared, tmp_path)))
    assert main(["checkpoint", "list", "frist"]) == 78
    assert "no run 'frist' (did you mean 'first'?): neither frist nor runs/frist holds" in capsys.readouterr().err


def test_levels_are_drawn_as_overrides_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "levels.png"
    pictures = set()
    for words in (["use.levels=plain"], ["use.levels=four"]):
        assert (
            main(["plot", "demo", "--levels", *words, "--out", str(there), "model.vocabulary=256", "data.path=no"]) == 0
        )
        pictures.add(there.read_bytes())
    assert capsys.readouterr().out == f"{there}\n" * 2 and len(pictures) == 2
