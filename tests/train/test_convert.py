"""A checkpoint as one safetensors file and back: the run goes on with the same bits."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nlscale.cli import main
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.faults import flip
from tests.records import losses, shards

SMALL = ["model.layers=2", "train.steps=11", "checkpoint.interval=6", "parallel.tensor=2"]  # windows are open at 6


@pytest.fixture(scope="module")
def trained(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = small_run(prepared, tmp_path_factory.mktemp("trained"), *SMALL)
    ranks(2, train, run)
    return run


def test_there_and_back_the_run_goes_on_bit_for_bit(trained: Run, prepared: str, tmp_path: Path) -> None:
    file, back = tmp_path / "whole.safetensors", tmp_path / "back"
    assert main(["checkpoint", "convert", trained.folder, "--step", "6", "--out", str(file)]) == 0
    tensors = load_file(file)
    assert {name.split("/")[0] for name in tensors} == {"weights", "moments.first", "moments.second", "windows"}
    run = small_run(prepared, back, *SMALL)
    assert main(["checkpoint", "convert", str(file), "--out", str(back)]) == 0
    assert main(["checkpoint", "verify", str(back)]) == 0
    assert read(str(back / "config.yaml")).folder == str(back)  # it is a recipe that goes on there
    ranks(2, train, run)
    assert losses(run) == losses(trained)[6:] and shards(run, 11) == shards(trained, 11)


def test_weights_alone_have_their_own_names(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, alone = tmp_path / "whole.safetensors", tmp_path / "weights.safetensors"
    assert main(["checkpoint", "convert", trained.folder, "--out", str(whole)]) == 0
    assert main(["checkpoint", "convert", trained.folder, "--out", str(alone), "--weights"]) == 0
    tensors = load_file(alone)
    assert tensors["blocks.0.mix.q.weight"].shape == (32, 32) and "embed.weight" in tensors
    assert all(torch.equal(each, load_file(whole)[f"weights/{name}"]) for name, each in tensors.items())
    assert main(["checkpoint", "convert", str(alone), "--out", str(tmp_path / "run")]) == 78
    assert "weights alone cannot be gone on with" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_refused(
    trained: Run, prepared: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file of it is written over, and two runs do not become one."""
    whole = tmp_path / "whole.safetensors"
    assert main(["checkpoint", "convert", trained.folder, "--out", str(whole)]) == 0
    for out in ("", str(tmp_path)):
        assert main(["checkpoint", "convert", trained.folder, "--out", out]) == 78
        assert "is a folder; a file in it would do" in capsys.readouterr().err
    other = small_run(prepared, tmp_path / "other", *SMALL, "run.name=other", "train.stop_at=2")
    ranks(2, train, other)
    for out in (str(tmp_path), other.folder, trained.folder):
        assert main(["checkpoint", "convert", str(whole), "--out", out]) == 78
        assert f"{out} holds files already; a new folder would do" in capsys.readouterr().err
    assert Folder(Path(other.folder)).steps() == [2]


def test_what_is_no_checkpoint_is_refused(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, torn = tmp_path / "foreign.safetensors", tmp_path / "torn.safetensors"
    save_file({"a": torch.ones(3)}, foreign)
    torn.write_bytes(b"\0" * 7)
    for file in (foreign, torn):
        assert main(["checkpoint", "convert", str(file), "--out", str(tmp_path / "run")]) == 78
    whole = str(tmp_path / "whole.safetensors")
    assert main(["checkpoint", "convert", trained.folder, "--out", whole, "--step", "5"]) == 78
    assert "no checkpoint of step 5; it has 11, 6" in capsys.readouterr().err
    assert main(["checkpoint", "convert", trained.folder, "--out", whole]) == 0
    path = Folder(Path(trained.folder)).checkpoint(11)
    shard = sorted(path.glob("*.distcp"))[0]
    before = shard.read_bytes()
    flip(shard, random.Random(1))
    assert main(["checkpoint", "convert", trained.folder, "--out", str(tmp_path / "x.safetensors")]) == 78
    assert "is damaged" in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()
    shard.write_bytes(before)
