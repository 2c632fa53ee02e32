"""Every demo recipe, cut to a few steps, learns on the demo's corpus; so does each on a layout of its own."""

from pathlib import Path

import pytest

from nlscale.config.read import read, shipped
from nlscale.data.write import Preparation, prepare
from nlscale.runtime.folder import Folder, read_lines
from nlscale.testing import ranks
from nlscale.train.loop import train

LAYOUTS = {  # demo recipes that run on another layout than tensor parallel 2
    "demo-titans-mag": (2, ["parallel.tensor=1", "parallel.context=2"]),
    "demo-delta": (2, ["parallel.tensor=1", "parallel.context=2"]),
    "demo-titans-mal": (2, ["parallel.tensor=1", "parallel.pipeline=2", "train.micro_batch=2"]),
    "demo-titans": (2, ["parallel.tensor=1", "train.micro_batch=2"]),
}
SHORT = ["train.steps=24", "train.global_batch=4", "train.micro_batch=4", "train.evaluate_rows=0", "log.wandb=disabled"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo's corpus, byte by byte: no tokeniser to train."""
    out = str(tmp_path_factory.mktemp("stdlib") / "out")
    prepare(Preparation(sources=("stdlib",), out=out, sequence=256, tokeniser="bytes", held_out=0.05))
    return out


@pytest.mark.parametrize("recipe", [name for name in shipped("recipes") if name.startswith("demo")])
def test_a_recipe_learns(recipe: str, corpus: str, tmp_path: Path) -> None:
    count, layout = LAYOUTS.get(recipe, (2, []))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "plots").mkdir()
    fixed = [*SHORT, *layout, f"data.path={corpus}", f"run.folder={tmp_path}", "model.layers=2", "model.vocabulary=384"]
    ranks(count, train, read(recipe, fixed), timeout=280)
    losses = [line["train/loss"] for line in read_lines(Folder(tmp_path).metrics) if "train/loss" in line]
    assert len(losses) == 24
    assert 5.5 < losses[0] < 6.1  # ln 384 = 5.95; what learns while it reads is below at once
    assert losses[-1] < 0.75 * losses[0]
