"""`nlscale bench reading`: its readers are timed where it says, and what it promises is held to."""

import pytest

from nlscale.bench import reading
from nlscale.bench.reading import ARMS, FLAT, PLAIN, table, timed
from nlscale.testing import ranks


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_reads_on(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small: what is held late is as much as it is early, but for attention over all of the row."""
    for name, value in (("EARLY", 32), ("COUNT", 2), ("ROUNDS", 2)):
        monkeypatch.setattr(reading, name, value)
    sizes = []
    for late in (512, 1024):
        monkeypatch.setattr(reading, "LATE", late)
        monkeypatch.setattr(reading, "LONGEST", 2048)
        first, then, size = ranks(1, timed, ARMS[arm])[0]
        assert first > 0 and then > 0
        sizes.append(size)
    assert sizes[1] > 1.8 * sizes[0] if arm == PLAIN else sizes[1] < 1.15 * sizes[0]


def test_a_memory_whose_late_token_costs_more_is_a_miss() -> None:
    def measured(said: list[str]) -> tuple[float, float, float]:
        slow = said == ARMS["Titans"]
        return 1e-3, 1e-3 * (2 * FLAT if slow or not said else 1.0), 2.0**20

    rows = table(measured)
    assert len(rows) == 2 * len(ARMS)
    assert [row.name.split(":")[0] for row in rows if not row.ok] == ["Titans"]
