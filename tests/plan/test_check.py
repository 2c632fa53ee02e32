"""`nlscale check`: what it says of rows, and of a world that does not fit, and that what it suggests works."""

from pathlib import Path

import pytest

from nlscale.cli import main
from nlscale.config.parallel import Parallel
from nlscale.data.write import Preparation, prepare
from nlscale.testing import ranks
from tests.corpus import write_corpus
from tests.optim.driver import built, usual
from tests.tiny import tiny


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """A dataset, and its rows for training."""
    root = tmp_path_factory.mktemp("rows")
    plan = Preparation(
        sources=(str(write_corpus(root / "in")),), out=str(root / "out"), sequence=32, tokeniser="bytes", held_out=0.1
    )
    return str(root / "out"), prepare(plan).rows["train"]


def test_rows_are_held_against_a_step(
    corpus: tuple[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows = corpus
    given = ["demo", f"data.path={path}", "data.sequence=32", "use.layout=null", f"run.folder={tmp_path}"]
    given += ["train.micro_batch=1", "train.steps=10", "parallel.tensor=1", "train.evaluate_rows=0"]
    assert main(["check", *given, f"train.global_batch={rows}"]) == 0
    assert f"data         {rows:,} rows for training; 10 steps go over them 10.00 times" in capsys.readouterr().out
    assert main(["check", *given, f"train.global_batch={rows + 1}"]) == 78
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"has {rows:,} rows for training, fewer than train.global_batch={rows + 1}; train.global_batch={rows}" in said
    )


@pytest.mark.parametrize(
    ("layout", "world", "said"),
    [
        (Parallel(tensor=8, sequence=True), 12, "parallel.tensor=4"),
        (Parallel(tensor=2, sequence=True), 3, "parallel.tensor=1 parallel.sequence=false"),
        (Parallel(tensor=2, pipeline=4, virtual_pipeline=2), 2, "parallel.pipeline=1 parallel.virtual_pipeline=1"),
        (Parallel(tensor=2, context=4, pipeline=2), 12, "parallel.context=2 parallel.pipeline=1"),
    ],
)
def test_what_a_world_can_hold_whole_is_said(layout: Parallel, world: int, said: str) -> None:
    assert layout.narrower(world) == said
    new = {name: typed(value) for name, value in (each.removeprefix("parallel.").split("=") for each in said.split())}
    assert world % Parallel(**{**vars(layout), **new}).ranks == 0


def typed(word: str) -> int | bool:
    return word == "true" if word in ("true", "false") else int(word)


def test_what_it_says_of_a_world_works(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["check", "demo", "--gpus", "1", "model.vocabulary=256", "data.path=nowhere"]
    assert main(given) == 78
    said = capsys.readouterr().err
    assert "1 rank cannot hold whole replicas of parallel.tensor=2 x parallel.pipeline=1 = 2 ranks; 2, 4, 8 ..." in said
    assert main([*given, *said.split("or ")[1].split(" on 1 ")[0].split()]) == 0


@pytest.mark.parametrize("mixer", ["titans", "titans_mac", "titans_mag", "titans_mal", "self_modifying"])
def test_a_memory_that_nothing_reads_is_said(mixer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing reads it: whatever its rate, the loss is the same. Where a row is two chunks, it is another."""
    name = f"model.{'titans' if mixer.startswith('titans') else mixer}"

    def said(*more: str) -> str:
        given = ["model.vocabulary=256", "data.path=no", f"model.mixer={mixer}", f"{name}.chunk=256", *more]
        assert main(["check", "demo", *given]) == 0
        return capsys.readouterr().out

    assert f"note         {name}.chunk=256 is a whole row: nothing reads" in said()
    assert "note" not in said(f"{name}.chunk=128") and "note" not in said("model.reset=never", "data.shuffle=false")
    whole, halves = (
        [
            ranks(1, loss, f"model.mixer={mixer}", f"{name}.chunk={chunk}", f"{name}.rate={rate}")[0]
            for rate in (0, 0.05)
        ]
        for chunk in (16, 8)
    )
    assert whole[0] == whole[1] and halves[0] != halves[1]


def loss(*overrides: str) -> float:
    """Of a row of 16 tokens."""
    run = tiny("model.layers=1", *overrides)
    world, model, _ = built(run)
    return float(model.chunks[0](*usual(run, 1, world)[0]))


@pytest.mark.parametrize(
    ("upload", "said"), [("", ""), ("/tmp/there", ""), ("memory://a", ""), ("foo://a/b", "Protocol not known: foo")]
)
def test_a_store_that_nobody_knows_is_said(upload: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", "demo", "model.vocabulary=256", "data.path=no", f"checkpoint.upload={upload}"])
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!")]
    assert (code, found) == ((78, [f"!            checkpoint.upload={upload}: {said}"]) if said else (0, []))
