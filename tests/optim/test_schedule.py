"""Learning rates against their closed forms."""

import math

import pytest

from nlscale.config.levels import Level
from nlscale.config.optim import Optim
from nlscale.optim.schedule import level_betas, level_decay, level_rate, rate


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


def test_time_scaled_moments_and_decay_do_in_one_update_what_a_fast_level_does_in_a_period() -> None:
    level, usual = Level(period=4), Optim(beta1=0.9, beta2=0.95, weight_decay=0.1)
    assert level_betas(usual, level) == (0.9, 0.95) and level_decay(usual, level) == 0.1
    scaled = Optim(beta1=0.9, beta2=0.95, weight_decay=0.1, time_scaled_betas=True, time_scaled_decay=True)
    assert level_betas(scaled, level) == pytest.approx((0.9**4, 0.95**4))
    assert level_decay(scaled, level) == pytest.approx(0.4)
    moment = 0.0
    for _ in range(4):  # a constant gradient: four updates at 0.9 are one at 0.9 ** 4
        moment = 0.9 * moment + 0.1
    assert 1 - level_betas(scaled, level)[0] == pytest.approx(moment)
