"""When a run draws its loss curve: at saves that lie far enough apart, and at its end."""

import time
from pathlib import Path

import pytest

from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.log import Journal
from nlscale.train import curve
from nlscale.train.curve import Curve

DRAW = Curve.draw  # as it is: other tests draw nothing


@pytest.fixture(autouse=True)
def _draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Curve, "draw", DRAW)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(curve.time, "monotonic", lambda: now[0])
    return now


def test_drawing_takes_little_of_a_runs_time(tmp_path: Path, at: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, drawn = Folder(tmp_path), []

    def plot(folders: list[Folder], target: Path) -> None:
        drawn.append(at[0])
        at[0] += 2.0

    monkeypatch.setattr("nlscale.train.plot.plot", plot)
    with Curve(folder, Journal(folder, True), True) as made:
        for moment in (50.0, 99.0, 251.0, 253.0, 300.0):
            at[0] = moment
            made.renew(1)
        assert drawn == [50.0, 253.0]
    assert drawn == [50.0, 253.0, 300.0]


def test_a_run_that_dies_is_drawn_by_its_leading_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("nlscale.train.plot.plot", lambda folders, target: drawn.append(target))
    for leads in (False, True):
        with (
            pytest.raises(ValueError, match="diverged"),
            Curve(Folder(tmp_path), Journal(Folder(tmp_path), True), leads),
        ):
            raise ValueError("diverged")
    assert drawn == [Folder(tmp_path).plot]


def test_a_disk_that_refuses_a_drawing_is_noted(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / "plots").write_text("a file where a folder should be")
    began = time.monotonic()
    Curve(folder, Journal(folder, True), True).renew(7)
    (event,) = read_lines(folder.events)
    assert (event["event"], event["step"]) == ("plot failed", 7) and time.monotonic() - began < 60
