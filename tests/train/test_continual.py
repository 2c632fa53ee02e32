"""Levels that change at a resume: only when asked for, said aloud, and with the weights as they were."""

from pathlib import Path

import pytest

from nlscale.config.run import Run
from nlscale.runtime.folder import Folder, read_lines
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run

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
    assert len(event["new"]) in (12, 16) and all(".last." in name for name in event["new"])
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
