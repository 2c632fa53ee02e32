"""The ledger of a run's time: hand-made records whose seconds are known."""

from typing import Any

import pytest

from nlscale.runtime.goodput import Goodput, account, lost, of_lines


def event(kind: str, time: float, **facts: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, "step": 0, **facts}


def step(number: int, seconds: float, waited: float = 0.0) -> dict[str, Any]:
    return {"step": number, "throughput/step_seconds": seconds, "throughput/data_wait_seconds": waited}


LINES = [step(1, 10.0, 1.0), step(2, 10.0), {"step": 2, "eval/loss": 1.0, "eval/seconds": 3.0}, step(3, 10.0, 2.0)]
FIRST = [
    event("attempt", 100.0),
    event("start", 120.0),
    event("save", 131.0, stall=2.0, seconds=5.0),
    event("attempt ended", 170.0, code=1),
]


def test_every_second_is_somewhere() -> None:
    """Two attempts: 70 s and 50 s; the second makes a lost step of 8 s again, and got going after 15 s."""
    events = [
        *FIRST,
        event("attempt", 300.0),
        event("start", 315.0),
        event("again", 315.0, steps=1, seconds=8.0),
        event("end", 345.0),
        event("attempt ended", 350.0, code=0),
    ]
    found = account(of_lines(LINES), events, 0.0)
    assert found == Goodput(120.0, 27.0, 3.0, 8.0, 2.0, 3.0, 35.0, 120.0 - 78.0)
    parts = {name: seconds for name, seconds in vars(found).items() if name != "held"}
    assert sum(parts.values()) == found.held and found.share == 27 / 120
    assert found.values()["goodput/recomputed_seconds"] == 8.0


def test_an_attempt_that_never_got_to_a_step_is_all_restart() -> None:
    found = account(of_lines(LINES), [*FIRST, event("attempt", 400.0), event("attempt ended", 425.0, code=69)], 0.0)
    assert found is not None and found.restart == 20.0 + 25.0 and found.held == 95.0


def test_an_attempt_without_an_end_lasted_until_its_last_record() -> None:
    """Lost with its machine: until the last event before the next attempt; open: until it was last seen."""
    gone = [*FIRST[:3], event("attempt", 500.0), event("start", 510.0)]
    found = account(of_lines(LINES[:1]), gone, 530.0)
    assert found is not None and found.held == pytest.approx(31.0 + 30.0)
    told = [*FIRST[:3], event("attempt ended", 490.0, code=None)]
    late = account(of_lines([]), told, 0.0)
    assert late is not None and late.held == pytest.approx(31.0)


def test_waiting_in_the_queue_is_no_time_of_machines() -> None:
    """An attempt is lost with its machine; a day later the run is submitted again."""
    later = [event("submit", 90000.0), event("attempt", 90100.0), event("start", 90110.0)]
    found = account(of_lines(LINES[:1]), [*FIRST[:3], *later], 90130.0)
    assert found is not None and found.held == pytest.approx(31.0 + 30.0) and found.restart == 30.0
    never = [event("attempt", 100.0), event("submit", 90000.0), event("attempt", 90100.0), event("start", 90110.0)]
    found = account(of_lines([]), never, 90130.0)
    assert found is not None and found.held == 30.0 and found.restart == 10.0


def test_before_the_first_attempt_there_is_nothing_to_tell() -> None:
    assert account(of_lines([]), [event("submit", 1.0)], 5.0) is None


def test_lost_steps_are_those_dropped() -> None:
    assert lost(LINES) == 30.0
