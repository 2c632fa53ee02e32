"""Jobs of several ranks have the machine to themselves, and everybody's turn comes."""

import os
import time
from pathlib import Path

from nlscale.testing import ranks
from tests.turns import Turns, several_alone

Stay = tuple[str, float, float]


def works(folder: Path, jobs: int) -> list[Stay]:
    """Tests one after another without a pause; in the middle one, ranks are started. When each was in the room."""
    turns, found = Turns(folder), list[Stay]()
    start = several_alone(turns, lambda count, seconds: time.sleep(seconds) or 0)
    for job in range(jobs):
        with turns.beside():
            began = time.monotonic()
            start(1, 0.02)
            found.append(("beside", began, time.monotonic()))
            if job == jobs // 2:
                with turns.alone():
                    began = time.monotonic()
                    time.sleep(0.05)
                    found.append(("alone", began, time.monotonic()))
            start(2, 0.01)
    return found


def test_who_is_alone_is_alone_and_the_others_share(tmp_path: Path) -> None:
    stays = ranks(3, works, tmp_path / "turns", 9)
    pairs = [(x, y) for i, mine in enumerate(stays) for theirs in stays[i + 1 :] for x in mine for y in theirs]
    meetings = [{x[0], y[0]} for x, y in pairs if x[1] < y[2] and y[1] < x[2]]
    assert all(met == {"beside"} for met in meetings) and meetings
    assert [sum(kind == "alone" for kind, *_ in mine) for mine in stays] == [1, 1, 1]


def comes_and_goes(folder: Path) -> float:
    """Rank 0 wants the room alone; the others share it, without a gap, until it has had it. How long it waited (s)."""
    turns, done = Turns(folder), folder / "done"
    if os.environ["RANK"] == "0":
        time.sleep(0.2)
        began = time.monotonic()
        with turns.alone():
            done.touch()
        return time.monotonic() - began
    while not done.exists():
        with turns.beside():
            time.sleep(0.05)
    return 0.0


def test_who_waits_to_be_alone_comes_before_those_who_come_after(tmp_path: Path) -> None:
    assert ranks(5, comes_and_goes, tmp_path / "turns", timeout=20)[0] < 2
