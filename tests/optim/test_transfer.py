"""Rates and initial values that transfer over widths: the coordinate check, and the table of who meets the width."""

import pytest

from nlscale.bench.transfer import ARMS, TOLERANCE, Arm, configure, powers
from nlscale.config.errors import UserError
from nlscale.config.levels import parameter_names
from nlscale.config.read import read
from nlscale.config.shapes import MIXERS
from nlscale.config.transfer import deviation_factor, rate_factor
from nlscale.model.count import sizes
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.optim.driver import built, usual, weights
from tests.sampled import sampled
from tests.tiny import tiny


def check(arm: Arm, transfers: bool) -> list[float]:
    run = configure(arm, 64, True)
    return powers(
        arm, transfers, join(run.parallel, run.cluster, 0), (64, 128, 256), 1 if arm.recipe == "demo-hope" else 2
    )


BY_NAME = {arm.name: arm for arm in ARMS}


@pytest.mark.parametrize("name", sampled(BY_NAME, [ARMS[3].name]))
def test_a_step_moves_activations_equally_far_at_any_width(name: str) -> None:
    """Without transfer it moves them the further, the wider the model is; so it is with levels of several periods."""
    ((with_it,), (without,)) = (ranks(1, check, BY_NAME[name], transfers) for transfers in (True, False))
    assert all(abs(power) <= TOLERANCE for power in with_it), with_it
    assert all(power > 2 * TOLERANCE - 0.1 for power in without), without


@pytest.mark.parametrize("mixer", MIXERS)
def test_whoever_has_more_inputs_at_another_width_moves_by_a_smaller_rate(mixer: str) -> None:
    """Of every mixer's leaves, those whose number of inputs grows with the width, told by their shapes at two widths."""
    runs = [tiny(f"model.mixer={mixer}", f"model.width={w}", f"model.heads={w // 8}", f"model.kv_heads={w // 8}",
                 f"model.hidden={2 * w}", "model.base_width=32", "model.linear.chunk=8", "model.written.chunk=8",
                 "model.titans.chunk=8", "model.self_modifying.chunk=8") for w in (32, 64)]  # fmt: skip
    for name in parameter_names(runs[0].model, runs[0].levels):
        small, large = (sizes(run.model, run.levels)(name) for run in runs)
        grew = large / small  # 4: matrices between widths; 2: one axis grows
        factor = rate_factor(name, runs[1].model)
        assert factor in (1.0, 0.5) and rate_factor(name, runs[0].model) == 1.0
        assert grew == 2 or (grew == 4) == (factor == 0.5), name
        one_row_a_head = name.endswith(("rate.weight", "keep.weight", "momentum.weight"))
        assert (factor == 0.5) == (grew == 4 or one_row_a_head or name == "head.weight"), name
        assert deviation_factor(name, runs[1].model) == (0.5 if name == "head.weight" else factor**0.5)


def moves(base: str) -> dict[str, float]:
    """How far the first step moves each leaf, in units of the embedding's move."""
    run = tiny("model.width=64", base, "optim.weight_decay=0", "optim.schedule=wsd", "optim.warmup=0")
    world, model, optimizer = built(run)
    before = weights(model, world)
    optimizer.step(4, model.forward_backward(usual(run, 1, world), True)[2].long())
    optimizer.arrive()
    after = weights(model, world)
    far = {name: float((after[name][0] - before[name][0]).abs().max()) for name in before}
    return {name: each / far["embed.weight"] for name, each in far.items()}


def test_steps_are_the_smaller_ones() -> None:
    ((plain,), (transferred,)) = (ranks(1, moves, base) for base in ("model.base_width=64", "model.base_width=16"))
    for name, far in transferred.items():
        wanted = 0.25 if name.endswith(".weight") and "norm" not in name and "embed" not in name else 1.0
        assert far == pytest.approx(plain[name] * wanted, rel=0.05), name


def test_what_does_not_transfer_is_refused() -> None:
    with pytest.raises(UserError, match="level fast follows muon"):
        read("demo", ["model.base_width=96", "optim.name=muon"])
    with pytest.raises(UserError, match=r"model\.tied=true"):
        read("demo", ["model.base_width=96", "model.tied=true"])
