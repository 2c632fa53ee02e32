"""The nested variant is Lookahead around each fast level's AdamW, bit for bit (I9)."""

import pytest
import torch
from nlscale_kernels import level_step

from nlscale.config.levels import level_of
from nlscale.optim.levels import decays
from nlscale.optim.schedule import level_rate
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.optim.driver import built, run_steps, usual
from tests.tiny import tiny
from tests.whole import assemble

OVERRIDES = ["model.variant=nested", "optim.clip=0", "optim.slow_weight=0.25"]


class Lookahead:
    """Zhang et al., 2019: k steps of AdamW, then the slow weights follow and the fast ones start from them anew."""

    def __init__(self, weight: torch.Tensor, decay: float, k: int | None) -> None:
        self.fast, self.decay, self.k = weight.clone(), decay, k
        self.slow, self.taken = weight.clone(), 0
        self.begin()

    def begin(self) -> None:
        self.moments, self.updates = (torch.zeros_like(self.fast).view(-1), torch.zeros_like(self.fast).view(-1)), 0

    def step(self, grad: torch.Tensor, rate: float, scale: float) -> None:
        self.taken += 1
        self.updates += 1
        row = level_step.AdamW.at(self.updates, rate, (0.9, 0.95), 1e-8, self.decay, scale)
        flat = self.fast.view(-1)
        level_step.adamw(flat, grad.flatten(), *self.moments, None, level_step.table([row], flat))
        if self.k and self.taken % self.k == 0:
            self.slow = self.slow + 0.25 * (self.fast - self.slow)
            self.fast = self.slow.clone()
            self.begin()


def oracle() -> dict[str, torch.Tensor]:
    run = tiny(*OVERRIDES)
    world = join(run.parallel, run.cluster, run.train.seed)
    model = parallelize(run, world, torch.float64)
    levels = {level.name: level for level in run.levels}
    ratio = {"fast": 2, "slow": 2, "long": None}
    learners, tokens, by_name = {}, dict.fromkeys(levels, 0), {leaf.name: leaf for leaf in model.leaves}
    for leaf in model.leaves:
        level = level_of(leaf.name, run.levels)
        k = ratio[level.name] if ".continuum." in leaf.name else None
        learners[leaf.name] = Lookahead(leaf.value, run.optim.weight_decay * decays(leaf.name), k)
    for step in range(1, 9):
        for leaf in model.leaves:
            leaf.value.copy_(learners[leaf.name].fast)
        total = model.forward_backward(usual(run, step, world), True)
        for level in levels.values():
            tokens[level.name] += int(total[1])
            if step % level.period == 0:
                for name in (n for n in learners if level_of(n, run.levels) is level):
                    rate = level_rate(run.optim, level, step, 100)
                    window = by_name[name].of(by_name[name].parameter.grad)  # autograd adds up what is not cleared
                    learners[name].step(window, rate, 1 / tokens[level.name])
                    window.zero_()
                tokens[level.name] = 0
    return {name: learner.fast for name, learner in learners.items()}


def test_i9_nested_is_lookahead() -> None:
    expected = ranks(1, oracle)[0]
    actual = assemble(ranks(1, run_steps, OVERRIDES, 8, torch.float64))
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name
    sequential = assemble(ranks(1, run_steps, ["model.variant=sequential", *OVERRIDES[1:]], 8, torch.float64))
    assert not torch.equal(
        sequential["blocks.0.continuum.fast.up.weight"], expected["blocks.0.continuum.fast.up.weight"]
    )


@pytest.mark.parametrize(("count", "overrides"), [(2, []), (2, ["parallel.tensor=2"]), (4, ["optim.reduce=eager"])])
def test_nested_over_ranks_equals_one_process(count: int, overrides: list[str]) -> None:
    one = assemble(ranks(1, run_steps, OVERRIDES, 8))
    many = assemble(ranks(count, run_steps, [*OVERRIDES, *overrides], 8))
    for name, weight in one.items():
        assert (many[name] - weight).norm() <= 1e-4 * weight.norm(), name


def recovered(weight: float) -> list[float]:
    """By flat of the fast level: how much of the way back to what was known a reset goes, after a walk elsewhere."""
    run = tiny("model.variant=nested", f"optim.slow_weight={weight}")
    _, _, optimizer = built(run, torch.float64)
    mover, found = optimizer.movers["fast"], []
    nested = [
        rule for shard in mover.shards for flat, rule in zip(shard.flats, shard.rules, strict=True) if flat.kind.nested
    ]
    known = [rule.state["slow"].clone() for rule in nested]  # task A is where the slow copies are
    for rule in nested:
        rule.master.add_(
            torch.randn(rule.master.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        )
    lost = [float((rule.master - a).square().sum()) for rule, a in zip(nested, known, strict=True)]
    optimizer.anchors.reset([group for group in optimizer.groups if group.name in ("fast", "slow")], optimizer.movers)
    for rule, a, before in zip(nested, known, lost, strict=True):
        found.append((before - float((rule.master - a).square().sum())) / before)
    return found


@pytest.mark.parametrize(("weight", "share"), [(0.1, 0.99), (0.3, 0.91), (0.5, 0.75)])
def test_row_20_a_reset_recovers_what_the_fast_level_forgot(weight: float, share: float) -> None:
    """Of a squared loss, 1 - e^2 comes back at the slow level's boundary, e the share that the slow copy follows."""
    found = ranks(1, recovered, weight)[0]
    assert found and all(each == pytest.approx(share, abs=1e-12) for each in found)
