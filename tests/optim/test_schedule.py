"""Learning rates against their closed forms."""

import math

import pytest

from nlscale.config.levels import Level
from nlscale.config.optim import Optim
from nlscale.optim.schedule import level_rate, rate


def test_warm_up_is_linear_and_cosine_ends_at_its_share() -> None:
    optim = Optim(lr=1.0, warmup=0.1, final=0.1)
    assert [rate(optim, step, 100) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(optim, 55, 100) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rate(optim, 100, 100) == pytest.approx(0.1)


def test_wsd_is_flat_then_falls_linearly() -> None:
    optim = Optim(lr=1.0, schedule="wsd", warmup=0.1, decay=0.2, final=0.0)
    assert {rate(optim, step, 100) for step in range(10, 81)} == {1.0}
    assert [rate(optim, step, 100) for step in (85, 90, 100)] == pytest.approx([0.75, 0.5, 0.0])


def test_a_longer_period_moves_further() -> None:
    optim = Optim(lr=1.0, warmup=0.0, kappa=0.5)
    assert level_rate(optim, Level(period=16, lr=0.5), 1, 10**9) == pytest.approx(0.5 * 4)
    assert level_rate(Optim(lr=1.0, warmup=0.0, kappa=0.0), Level(period=16), 1, 10**9) == pytest.approx(1.0)
