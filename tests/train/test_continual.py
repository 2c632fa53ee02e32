"""Levels that change at a resume: only when asked for, said aloud, and with the weights as they were."""

import json
from pathlib import Path

import pytest
import torch

from nlscale.config.run import Run
from nlscale.data.write import Preparation, prepare
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.world import join
from nlscale.testing import ranks
from nlscale.train.loop import train
from nlscale.train.pieces import Pieces, load, stored
from tests.corpus import small_run, write_corpus
from tests.tiny import tiny

LEVELS = (
    "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 4, width: 0.25}, "
    "{name: long, period: 8, width: 0.25%s}]"
)
ASKED = "checkpoint.levels=change"


def lines(run: Run) -> list[dict]:
    return [line for line in read_lines(Folder(Path(run.folder)).metrics) if "train/loss" in line]


def fired(run: Run, level: str) -> list[int]:
    return [line["step"] for line in lines(run) if line.get(f"optim/level/{level}/fired")]


def changed(
    data: str, folder: Path, count: int, *overrides: str, before: int = 1, first: tuple[str, ...] = ()
) -> tuple:
    """A run stopped at 15 and resumed otherwise; the event that says so."""
    ranks(before, train, small_run(data, folder, "train.stop_at=15", *first))
    run = small_run(data, folder, ASKED, *overrides)
    ranks(count, train, run)
    (event,) = (e for e in read_lines(Folder(folder).events) if e["event"] == "levels change")
    return run, event


def test_a_change_is_refused_unless_asked_for(prepared: str, tmp_path: Path) -> None:
    ranks(1, train, small_run(prepared, tmp_path, "train.stop_at=2"))
    with pytest.raises(RuntimeError, match="period=8 .* -> .*frozen .*checkpoint.levels=change goes on"):
        ranks(1, train, small_run(prepared, tmp_path, LEVELS % ", frozen: true"))
    with pytest.raises(RuntimeError, match="give another run.name"):
        ranks(1, train, small_run(prepared, tmp_path, "model.hidden=96", ASKED))


def test_a_new_period_closes_the_open_window_at_its_next_boundary(prepared: str, tmp_path: Path) -> None:
    levels = (LEVELS % "").replace("period: 4", "period: 5").replace("period: 8", "period: 10")
    run, event = changed(prepared, tmp_path, 2, levels)
    assert event["step"] == 15 and event["windows_dropped"] == [] and event["new"] == []
    assert event["moved"] == ["long period=8 -> long period=10", "slow period=4 -> slow period=5"]
    assert fired(run, "slow") == [4, 8, 12, 20, 25, 30] and fired(run, "long") == [8, 20, 30]
    assert fired(run, "fast") == list(range(1, 31))


def test_a_frozen_level_stops_and_its_window_is_dropped(prepared: str, tmp_path: Path) -> None:
    run, event = changed(prepared, tmp_path, 1, LEVELS % ", frozen: true")
    assert event["windows_dropped"] == ["long"]
    assert fired(run, "long") == [8] and fired(run, "slow")[-1] == 30


@pytest.mark.parametrize("variant", ["independent", "nested"])
def test_a_new_level_changes_nothing_until_it_moves(variant: str, prepared: str, tmp_path: Path) -> None:
    common = f"model.variant={variant}"
    unbroken = small_run(prepared, tmp_path / "unbroken", common)
    ranks(1, train, unbroken)
    narrower = (LEVELS % "").replace("0.5", "0.4").replace("0.25", "0.2")
    wider = narrower[:-1] + ", {name: last, period: 16, width: 0.2}]"
    run, event = changed(prepared, tmp_path / "wider", 2, common, wider, "model.hidden=80", first=(common,))
    assert len(event["new"]) in (6, 8) and all(".last." in name for name in event["new"])
    assert event["moved"] == [] and event["windows_dropped"] == []
    before, after = ([line["train/loss"] for line in lines(each)] for each in (unbroken, run))
    assert after[:23] == pytest.approx(before[:23], rel=2e-4)
    assert fired(run, "last") == [16, 30]  # at its boundary, and at the run's end with what it has
    assert after[16:] != before[16:]


def test_a_parameter_that_changes_its_level_keeps_its_moments(prepared: str, tmp_path: Path) -> None:
    levels = (LEVELS % "")[:-1] + ", {name: late, period: 16, width: 0, match: [head.weight]}]"
    run, event = changed(prepared, tmp_path, 1, levels)
    assert event["moved"] == ["fast period=1 -> late period=16"]
    assert event["windows_dropped"] == []
    assert fired(run, "late") == [16, 30]
    assert max(line["train/loss"] for line in lines(run)[15:]) < lines(run)[0]["train/loss"]


KEEPING = (
    "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 4, width: 0.25, anchor: 3.0}, "
    "{name: long, period: 8, width: 0.25, project: 2}]"
)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another dataset of the same tokeniser."""
    folder = tmp_path_factory.mktemp("other")
    corpus = write_corpus(folder / "corpus", seed=5, space="-")
    prepare(Preparation(sources=(str(corpus),), out=str(folder / "data"), sequence=32, tokeniser="bytes", held_out=0.1))
    return str(folder / "data")


def test_new_data_is_refused_unless_asked_for(prepared: str, other: str, tmp_path: Path) -> None:
    ranks(1, train, small_run(prepared, tmp_path, "train.stop_at=2"))
    with pytest.raises(
        RuntimeError,
        match=r"(?s)was trained on another dataset.*checkpoint.data=change.*dataset 1: fingerprint \w+ -> \w+",
    ):
        ranks(1, train, small_run(other, tmp_path))


def test_new_data_of_another_tokeniser_is_refused(prepared: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", seed=5)
    plan = Preparation(
        sources=(str(corpus),), out=str(tmp_path / "data"), sequence=32, tokeniser="bpe:300", held_out=0.1
    )
    prepare(plan)
    ranks(1, train, small_run(prepared, tmp_path / "run", "train.stop_at=2"))
    with pytest.raises(
        RuntimeError, match=r"tokens of another tokeniser \(bytes\).*--tokeniser bytes makes data for it"
    ):
        ranks(1, train, small_run(str(tmp_path / "data"), tmp_path / "run", "checkpoint.data=change"))


def test_a_task_ends_where_the_data_changes(prepared: str, other: str, tmp_path: Path) -> None:
    """Rows begin anew, levels keep what they were told to, and a stop inside the second task changes no bit."""
    asked = "checkpoint.data=change"
    for folder in ("once", "twice"):
        ranks(2, train, small_run(prepared, tmp_path / folder, KEEPING, "train.stop_at=16"))
    once = small_run(other, tmp_path / "once", KEEPING, asked)
    ranks(2, train, once)
    ranks(2, train, small_run(other, tmp_path / "twice", KEEPING, asked, "train.stop_at=21"))
    twice = small_run(other, tmp_path / "twice", KEEPING, asked)
    ranks(2, train, twice)
    assert [line["train/loss"] for line in lines(once)] == [line["train/loss"] for line in lines(twice)]
    facts = [
        json.loads((Folder(Path(r.folder)).checkpoint(30) / "train_state.json").read_text()) for r in (once, twice)
    ]
    assert facts[0]["loader"]["step"] == 14 and facts[0]["tasks"] == {"slow": [1, 0, 0], "long": [0, 1, 4]}
    assert facts[1]["tasks"] == facts[0]["tasks"]
    events = [e for e in read_lines(Folder(tmp_path / "twice").events) if e["event"] == "data change"]
    assert [e["step"] for e in events] == [16]


def test_switches_may_come_on_at_a_resume_on_another_layout(prepared: str, tmp_path: Path) -> None:
    ranks(1, train, small_run(prepared, tmp_path, "train.stop_at=16"))
    ranks(2, train, small_run(prepared, tmp_path, KEEPING, "parallel.tensor=2", "train.stop_at=20"))
    ranks(1, train, small_run(prepared, tmp_path, KEEPING))
    facts = json.loads((Folder(tmp_path).checkpoint(30) / "train_state.json").read_text())
    assert facts["tasks"] == {"slow": [1, 0, 0], "long": [0, 0, 2]}


def test_a_level_that_is_of_nothing_is_refused(prepared: str, tmp_path: Path) -> None:
    ranks(1, train, small_run(prepared, tmp_path, ONE, "train.stop_at=2"))
    with pytest.raises(RuntimeError, match="levels.fast.of=al: the checkpoint has no such level; it has all"):
        ranks(1, train, small_run(prepared, tmp_path, (PARTED % (4, 8)).replace("of: all", "of: al"), ASKED))


def weights_of(run: Run, leaf: str) -> torch.Tensor:
    """A master in the run's last checkpoint."""
    path = Folder(Path(run.folder)).checkpoint(Folder(Path(run.folder)).steps()[0])
    return ranks(1, read_leaf, str(path), leaf)[0]


def read_leaf(path: str, leaf: str) -> torch.Tensor:
    shape = stored(Path(path))[f"weights/{leaf}"].shape
    value = torch.empty(shape)
    join(tiny().parallel, tiny().cluster, 0)
    load({f"weights/{leaf}": Pieces(shape, [((0, 0), value)], False)}, Path(path))
    return value


def test_a_parameter_that_joins_an_anchored_level_is_anchored_where_it_is(prepared: str, tmp_path: Path) -> None:
    firm = KEEPING.replace("anchor: 3.0", "anchor: 1.0e+9")
    first = small_run(prepared, tmp_path, firm, "train.stop_at=16")
    ranks(1, train, first)
    trained = weights_of(first, "head.weight")
    joined = small_run(prepared, tmp_path, firm.replace("1.0e+9", "1.0e+9, match: [head.weight]"), ASKED)
    ranks(2, train, joined)
    after = weights_of(joined, "head.weight")
    assert (after - trained).norm() < 1e-3 * trained.norm()


def test_what_is_kept_follows_a_level_that_is_parted_or_moves_otherwise(prepared: str, tmp_path: Path) -> None:
    kept = "levels=[{name: all, anchor: 1.0, project: 4}]"
    ranks(1, train, small_run(prepared, tmp_path, kept, "train.stop_at=8"))
    ranks(1, train, small_run(prepared, tmp_path, kept.replace("4}", "6}"), "train.stop_at=10"))
    parts = ", ".join(f"{{name: {name}, width: 0.5, of: all, anchor: 1.0, project: 6}}" for name in "ab")
    state = Folder(tmp_path).checkpoint(10) / "train_state.json"
    before = json.loads(state.read_text())["tasks"]["all"]
    assert before == [0, 0, 10]
    ranks(1, train, small_run(prepared, tmp_path, f"levels=[{parts}]", ASKED, "train.stop_at=12"))
    after = json.loads((Folder(tmp_path).checkpoint(12) / "train_state.json").read_text())["tasks"]
    assert after == {"a": [0, 0, 12], "b": [0, 0, 12]}


def test_fewer_places_than_directions_are_refused(prepared: str, other: str, tmp_path: Path) -> None:
    many = "levels=[{name: all, project: 4}]"
    ranks(1, train, small_run(prepared, tmp_path, many, "train.stop_at=8"))
    ranks(1, train, small_run(other, tmp_path, many, "checkpoint.data=change", "train.stop_at=10"))
    with pytest.raises(
        RuntimeError, match="levels.all.project=1, but 2 directions of earlier tasks are kept; 2 or more"
    ):
        ranks(1, train, small_run(other, tmp_path, many.replace("4", "1")))


ONE = "levels=[{name: all}]"
PARTED = (
    "levels=[{name: fast, width: 0.5, of: all}, {name: slow, period: %d, width: 0.25, of: all}, "
    "{name: long, period: %d, width: 0.25, of: all}]"
)


def test_row_31_a_trained_level_parted_into_levels_computes_the_same(prepared: str, tmp_path: Path) -> None:
    """Weights and moments go on: with all periods 1 the parted run is the unbroken one, on whatever layout."""
    common = "optim.clip_scope=global_due"
    unbroken = small_run(prepared, tmp_path / "unbroken", ONE, common)
    ranks(1, train, unbroken)
    expected = [line["train/loss"] for line in lines(unbroken)]
    ranks(2, train, small_run(prepared, tmp_path / "same", ONE, common, "parallel.tensor=2", "train.stop_at=15"))
    same = small_run(prepared, tmp_path / "same", PARTED % (1, 1), common, ASKED, "train.stop_at=20")
    ranks(2, train, same)
    ranks(1, train, small_run(prepared, tmp_path / "same", PARTED % (1, 1), common, ASKED))
    assert [line["train/loss"] for line in lines(same)] == pytest.approx(expected, rel=2e-4)
    run, event = changed(prepared, tmp_path / "slower", 1, PARTED % (4, 8), common, first=(ONE, common))
    assert event["new"] == [] and event["moved"] == ["all period=1 -> fast period=1"] + [
        f"all period=1 -> {name} period={period}" for name, period in (("long", 8), ("slow", 4))
    ]
    losses = [line["train/loss"] for line in lines(run)]
    assert losses[15] == pytest.approx(expected[15], rel=1e-5) and losses[17:] != expected[17:]
    assert fired(run, "slow") == [16, 20, 24, 28, 30] and fired(run, "long") == [16, 24, 30]


def test_parts_that_are_not_the_whole_are_refused(prepared: str, tmp_path: Path) -> None:
    ranks(1, train, small_run(prepared, tmp_path, ONE, "train.stop_at=2"))
    narrow = PARTED % (4, 8)
    with pytest.raises(RuntimeError, match="with 32 \\+ 16 units .* which has 64; together they must be the whole"):
        ranks(1, train, small_run(prepared, tmp_path, narrow.replace("0.25, of: all}]", "0.25}]"), ASKED))
    with pytest.raises(RuntimeError, match="holds another model or other levels"):
        ranks(1, train, small_run(prepared, tmp_path, narrow))


def test_whole_layers_become_levels_by_match(prepared: str, tmp_path: Path) -> None:
    late = LEVELS % "" + ""
    levels = late[:-1] + ', {name: late, period: 16, width: 0, match: ["blocks.1.continuum.*"]}]'
    unbroken = small_run(prepared, tmp_path / "unbroken")
    ranks(1, train, unbroken)
    run, event = changed(prepared, tmp_path / "regrouped", 1, levels)
    assert len(event["moved"]) == 3 and all("-> late period=16" in line for line in event["moved"])
    assert fired(run, "late") == [16, 30]
    before, after = ([line["train/loss"] for line in lines(each)] for each in (unbroken, run))
    assert after[:16] == before[:16] and after[16:] != before[16:]  # the function is kept, bit for bit
