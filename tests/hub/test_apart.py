"""A checkpoint holds its tokeniser: it speaks, and is written for others, where its dataset is not."""

import json
from pathlib import Path

import pytest

from nlscale.config.run import Run
from nlscale.data.write import Preparation, prepare
from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train.convert import to_checkpoint, to_file
from nlscale.train.loop import train
from nlscale.train.manifest import verify
from tests.corpus import small_run, write_corpus
from tests.told import told

FILE = "tokenizer.json"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run, whose dataset of a small BPE is gone since."""
    root = tmp_path_factory.mktemp("apart")
    corpus = write_corpus(root / "in", documents=200)
    out = root / "out"
    prepare(Preparation(sources=(str(corpus),), out=str(out), sequence=32, tokeniser="bpe:300", held_out=0.1))
    run = small_run(str(out), root / "run", "train.steps=4", "checkpoint.interval=2")
    ranks(2, train, run)
    out.rename(root / "gone")
    return run


def test_it_goes_on_with_a_text_and_is_exported(alone: Run, tmp_path: Path) -> None:
    for step in (2, 4):
        path = Folder(Path(alone.folder)).checkpoint(step)
        assert not verify(path) and FILE in json.loads((path / "manifest.json").read_text())["files"]
    said = told("generate", alone.folder, "--prompt", "memory learns", "--tokens", "8")
    assert said.code == 0 and said.out.startswith("memory learns"), said.err
    assert told("export", alone.folder, "--out", str(tmp_path / "out")).code == 0
    ours = (Path(alone.data.path or "").with_name("gone") / FILE).read_text()
    theirs = (tmp_path / "out" / FILE).read_text()
    assert json.loads(theirs)["model"]["vocab"] == json.loads(ours)["model"]["vocab"]


def test_rows_are_asked_for_where_there_is_something_to_lose(alone: Run) -> None:
    said = told("eval", alone.folder, "--rows", "2")
    assert said.code == 78 and f"data.path={alone.data.path}: no such folder" in said.err, said.err


def test_a_file_of_it_holds_the_tokeniser_too(alone: Run, tmp_path: Path) -> None:
    to_file(Folder(Path(alone.folder)).checkpoint(4), tmp_path / "whole.safetensors")
    assert to_checkpoint(tmp_path / "whole.safetensors", Folder(tmp_path / "again")) == 4
    asked = ["--prompt", "memory", "--tokens", "8", "--temperature", "0"]
    first, again = (told("generate", folder, *asked) for folder in (alone.folder, str(tmp_path / "again")))
    assert first.code == again.code == 0 and first.out == again.out and len(first.out) > len("memory\n")


def test_another_tokeniser_is_not_taken_for_it(alone: Run, tmp_path: Path) -> None:
    to_file(Folder(Path(alone.folder)).checkpoint(4), tmp_path / "whole.safetensors")
    to_checkpoint(tmp_path / "whole.safetensors", Folder(tmp_path / "again"))
    file = Folder(tmp_path / "again").checkpoint(4) / FILE
    file.write_text(file.read_text().replace('"ignore_merges": false', '"ignore_merges": true'))
    said = told("generate", str(tmp_path / "again"), "--prompt", "memory")
    assert said.code == 78 and f"{file} is not the tokeniser that" in said.err, said.err
    file.unlink()
    assert FILE in told("generate", str(tmp_path / "again"), "--prompt", "memory").err
