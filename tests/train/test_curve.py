"""When a run draws its loss curve: at saves that lie far enough apart, and at its end."""

import contextlib
import time
from pathlib import Path

import pytest

from nlscale.config.errors import SavedOnSignal, StoppedOnPurpose
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.holder import Hold
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
    with Curve(folder, Journal(folder, True), Hold(tmp_path, 60.0), True) as made:
        for moment in (50.0, 99.0, 251.0, 253.0, 300.0):
            at[0] = moment
            made.renew(1)
        assert drawn == [50.0, 253.0]
    assert drawn == [50.0, 253.0, 300.0]


@pytest.mark.parametrize(
    ("error", "draws"),
    [(None, True), (StoppedOnPurpose("diverged"), True), (SavedOnSignal("75"), False), (OSError(), False)],
)
def test_only_a_run_that_ends_here_is_drawn_at_last(
    error: Exception | None, draws: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its leading rank, while no other attempt has the folder; a drawing that fails changes no outcome."""
    drawn: list[Path] = []

    def plot(folders: list[Folder], target: Path) -> None:
        drawn.append(target)
        raise ValueError("a font is missing")

    monkeypatch.setattr("nlscale.train.plot.plot", plot)
    folder, hold = Folder(tmp_path), Hold(tmp_path, 60.0)
    for leads in (False, True):
        with contextlib.suppress(type(error) if error else ()), Curve(folder, Journal(folder, True), hold, leads):
            if error:
                raise error
    assert drawn == ([folder.plot] if draws else [])
    assert [event["event"] for event in read_lines(folder.events)] == (["plot failed"] if draws else [])
    monkeypatch.setattr(Hold, "replaced", True)
    Curve(folder, Journal(folder, True), hold, True).draw()
    assert len(drawn) == int(draws)


def test_a_disk_that_refuses_a_drawing_is_noted(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / "plots").write_text("a file where a folder should be")
    began = time.monotonic()
    Curve(folder, Journal(folder, True), Hold(tmp_path, 60.0), True).renew(7)
    (event,) = read_lines(folder.events)
    assert (event["event"], event["step"]) == ("plot failed", 7) and time.monotonic() - began < 60
