"""`nlscale check`: what it says of rows, and of a world that does not fit, and that what it suggests works."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nlscale.cli import main
from nlscale.config.parallel import Parallel
from nlscale.config.shapes import MIXERS
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
    assert f"data         {rows:,} rows for training, gone over 10.00 times" in capsys.readouterr().out
    assert main(["check", *given, f"train.global_batch={rows + 1}"]) == 78
    said = " ".join(capsys.readouterr().out.split())
    few = f"has {rows:,} rows for training, fewer than train.global_batch="
    assert f"{few}{rows + 1}; train.global_batch={rows} or more data would work" in said
    # 3 rows a pass: what is named goes into passes; where no pass is filled, nothing is named
    for micro in (3, rows + 1):
        passes = [f"train.micro_batch={micro}", f"train.global_batch={micro * (rows + 1)}"]
        assert main(["check", *given, *passes]) == 78
        said = " ".join(capsys.readouterr().out.split())
        named = f"train.global_batch={rows // 3 * 3} or " if micro == 3 else ""
        assert f"{few}{micro * (rows + 1)}; {named}more data would work" in said
        if named:
            assert main(["check", *given, passes[0], named.split()[0]]) == 0
            capsys.readouterr()


def test_rows_to_replay_are_held_against_a_step(
    corpus: tuple[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows = corpus
    given = ["demo", f"data.path={path}", "data.sequence=32", "use.layout=null", f"run.folder={tmp_path}"]
    given += ["train.micro_batch=1", "train.global_batch=4", "parallel.tensor=1", "train.evaluate_rows=0"]
    given += ["levels=[{name: all, replay: 1.0}]", f"data.replay={path}"]
    assert main(["check", *given, f"data.replay_batch={rows}"]) == 0
    capsys.readouterr()
    assert main(["check", *given, f"data.replay_batch={rows + 1}"]) == 78
    said = " ".join(capsys.readouterr().out.split())
    few = f"data.replay={path} has {rows:,} rows for training, fewer than data.replay_batch={rows + 1}"
    assert f"{few}; data.replay_batch={rows} or more data would work" in said
    assert main(["check", *given, "data.replay=gone", "data.replay_batch=4"]) == 78
    assert "data.replay=gone: no such folder" in capsys.readouterr().err


def test_streams_of_a_mixture_are_gone_over_by_their_weights(
    corpus: tuple[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows = corpus
    streams = f"data.streams=[{{path: {path}, weight: 3}}, {{path: {path}, weight: 1}}]"
    given = ["demo", "data.path=null", streams, "data.sequence=32", f"run.folder={tmp_path}", "train.evaluate_rows=0"]
    given += ["use.layout=null", "parallel.tensor=1", "train.steps=8", "train.micro_batch=1"]
    assert main(["check", *given, f"train.global_batch={rows}"]) == 0
    assert f"{2 * rows:,} rows for training, gone over {path} 6.00 times, {path} 2.00 times" in capsys.readouterr().out
    assert main(["check", *given, f"train.global_batch={2 * rows + 1}"]) == 78
    assert f"has {2 * rows:,} rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layout", "world", "said"),
    [
        (Parallel(tensor=8, sequence=True), 12, {"tensor": 4}),
        (Parallel(tensor=2, sequence=True), 3, {"tensor": 1, "sequence": False}),
        (Parallel(tensor=2, pipeline=4, virtual_pipeline=2), 2, {"pipeline": 1, "virtual_pipeline": 1}),
        (Parallel(tensor=2, context=4, pipeline=2), 12, {"context": 2, "pipeline": 1}),
    ],
)
def test_what_a_world_can_hold_whole(layout: Parallel, world: int, said: dict[str, int | bool]) -> None:
    assert layout.narrower(world) == said
    assert world % replace(layout, **said).ranks == 0  # type: ignore[arg-type]


def test_what_is_said_of_a_world_works(capsys: pytest.CaptureFixture[str]) -> None:
    """Where something is; for some worlds the batch would have to be another, too."""
    given, named = ["check", "demo", "model.vocabulary=256", "data.path=nowhere"], 0
    for world in range(1, 17):
        code = main([*given, "--gpus", str(world), "train.micro_batch=1"])
        said = capsys.readouterr().err
        assert (code == 0) == (world in (2, 4, 8, 16))
        assert code == 0 or world % 2 == 0 or f"{world} rank" in said and "of parallel.tensor=2 x parallel.pip" in said
        if ", or parallel." in said:
            named += 1
            words = said.split(", or ")[1].split(" on ")[0].split()
            assert main([*given, "--gpus", str(world), "train.micro_batch=1", *words]) == 0
            capsys.readouterr()
    assert named == 1  # of one rank: 8 rows are no multiple of 3, 5, 7 ... replicas


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
    ("upload", "said"),
    [
        ("", ""),
        ("/tmp/there", ""),
        ("memory://a", ""),
        ("simplecache::memory://a", ""),
        ("foo://a/b", "Protocol not known: foo"),
    ],
)
def test_a_store_that_nobody_knows_is_said(upload: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", "demo", "model.vocabulary=256", "data.path=no", f"checkpoint.upload={upload}"])
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!")]
    assert (code, found) == ((78, [f"!            checkpoint.upload={upload}: {said}"]) if said else (0, []))


@pytest.mark.parametrize(("where", "ok"), [([], False), (["cluster.python=python3"], True)], ids=["here", "elsewhere"])
def test_a_stores_package_is_asked_for_where_ranks_have_this_interpreter(
    where: list[str], ok: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # not installed
    given = ["check", "demo", "model.vocabulary=256", "data.path=no", "checkpoint.upload=s3://bucket/runs", *where]
    assert main(given) == (0 if ok else 78)
    assert ("Install s3fs" in capsys.readouterr().out) == (not ok)


def test_a_window_that_nothing_looks_through_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for mixer in MIXERS:
        assert (
            main(["check", "demo", "model.vocabulary=256", "data.path=no", "model.window=64", f"model.mixer={mixer}"])
            == 0
        )
        said = f"model.window=64 is what attention sees, and model.mixer={mixer} has none" in capsys.readouterr().out
        assert said == (mixer in ("linear", "delta", "titans", "self_modifying"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.sequence=1000"], "with 896 or 1024 it leaves out blocks beyond a document"),
        (["data.sequence=96"], "with 128 it leaves out blocks beyond a document"),
        (
            ["data.sequence=1000", "model.attention=causal", "model.window=64"],
            "with 896 or 1024 it leaves out blocks beyond a window",
        ),
        (["data.sequence=1000", "model.attention=causal"], ""),
        (["data.sequence=1024"], ""),
        (["data.sequence=1000", "train.precision=fp32"], ""),
        (["data.sequence=1000", "model.mixer=delta"], ""),
    ],
)
def test_rows_whose_attention_is_computed_whole_are_told(
    overrides: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check", "demo", "model.vocabulary=256", "data.path=no", "train.precision=bf16", *overrides])
    words = " ".join(capsys.readouterr().out.split())
    assert said in words and bool(said) == ("no whole blocks of 128 tokens" in words)
