"""The nested variant's second order: the gradient through unrolled fast steps, against finite differences."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nlscale.config.errors import UserError
from nlscale.config.levels import level_of
from nlscale.testing import ranks
from nlscale.train.loop import train
from nlscale.train.second_order import SecondOrder
from tests.corpus import small_run
from tests.optim.driver import built, usual
from tests.records import losses
from tests.tiny import tiny

SECOND = [
    "model.variant=nested",
    "optim.second_order=true",
    "optim.name=sgd",
    "optim.matrix.momentum=0",
    "optim.clip=0",
]
STEEP = ["optim.schedule=wsd", "optim.warmup=0", "optim.lr=0.5", "optim.weight_decay=0.01", "model.init_std=0.2"]


def slopes(level: str) -> tuple[float, float, float]:
    """dJ/dw_0 along a random direction: by autograd, by finite differences, and without the steps between."""
    run = tiny(*SECOND, *STEEP)
    world, model, optimizer = built(run, torch.float64)
    second = SecondOrder(run, model, optimizer)
    fast = next(each for each in run.levels if each.name == level)
    window = [usual(run, step, world) for step in (1, 2, 3, 4)]
    gradients = second.gradient(fast, window, 4)
    generator = torch.Generator().manual_seed(0)
    copies = second.slow_copies(fast)
    along = {leaf.name: torch.randn(copy.shape, generator=generator, dtype=copy.dtype) for leaf, copy in copies}

    def objective(size: float) -> float:
        moved = {leaf.name: (copy + size * along[leaf.name]).requires_grad_() for leaf, copy in copies}
        return float(second.objective(fast, moved, window, 4))

    frozen = second.gradient(fast, window[: fast.period], fast.period)
    dots = [sum(float((g * along[name]).sum()) for name, g in each.items()) for each in (gradients, frozen)]
    return dots[0], (objective(1e-6) - objective(-1e-6)) / 2e-6, dots[1]


@pytest.mark.parametrize("level", ["fast", "slow"])
def test_the_gradient_goes_through_the_fast_steps(level: str) -> None:
    ((gradient, difference, without),) = ranks(1, slopes, level)
    assert gradient == pytest.approx(difference, rel=1e-5)
    assert abs(without - difference) > 1e-3 * abs(difference)  # it matters that they were taken


def with_bad_rows(bad: Mapping[int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a window in whose steps the first `bad` micro-batches have no finite loss, and without those batches."""
    run = tiny(*SECOND, *STEEP)
    world, model, optimizer = built(run, torch.float64)
    second, poison = SecondOrder(run, model, optimizer), 127
    window = [list(usual(run, step, world)) for step in (1, 2, 3, 4)]
    for batches in window:
        for tokens, targets, _ in batches:
            targets[tokens == poison] = -1
            tokens[tokens == poison] = 5
    rest = [batches[bad.get(i, 0) :] for i, batches in enumerate(window)]
    without = second.gradient(run.levels[0], rest, 4)
    for i, count in bad.items():
        for tokens, _, _ in window[i][:count]:
            tokens[0, 3] = poison
    next(leaf for leaf in model.leaves if leaf.name == "embed.weight").value[poison] = torch.inf
    return second.gradient(run.levels[0], window, 4), without


@pytest.mark.parametrize("bad", [{1: 1, 2: 4}, {0: 4, 3: 4}, dict.fromkeys(range(4), 4)])
def test_losses_that_are_not_finite_count_for_nothing(bad: dict[int, int]) -> None:
    ((found, expected),) = ranks(1, with_bad_rows, bad)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-12, atol=0)
        assert bool(gradient.norm() > 0) == (sum(bad.values()) < 16)


def boundary() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(slow copy before, its step by the rule, slow copy after = fast weights) of each leaf that has one, at step 4."""
    run = tiny(*SECOND, *STEEP)
    world, model, optimizer = built(run)
    second = SecondOrder(run, model, optimizer)
    for step in range(1, 5):
        batches = usual(run, step, world)
        tokens = model.forward_backward(batches, True)[2].long()
        second.before(step, batches)
        before = {leaf.name: c.clone() for level in run.levels[:2] for leaf, c in second.slow_copies(level)}
        steps = {name: value.clone() for name, value in optimizer.anchors.gradients.items()}
        optimizer.step(step, tokens)
    after = {leaf.name: c.clone() for level in run.levels[:2] for leaf, c in second.slow_copies(level)}
    for leaf in model.leaves:
        if leaf.name in after:
            assert torch.equal(leaf.value, after[leaf.name])
    assert {level_of(name, run.levels).name for name in steps} == {"fast", "slow"}
    return [(before[name], steps[name], after[name]) for name in after]


def test_slow_copies_take_the_step_and_fast_levels_begin_there() -> None:
    for before, step, after in ranks(1, boundary)[0]:
        assert torch.equal(before - step, after) and step.norm() > 0


def test_a_run_learns_and_other_layouts_are_refused(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path, *SECOND, "optim.lr=0.3", "optim.weight_decay=0", "optim.kappa=0")
    ranks(1, train, run)
    assert losses(run)[-1] < losses(run)[0]
    with pytest.raises(RuntimeError, match="in one process, not in 2"):
        ranks(2, train, run)
    with pytest.raises(UserError, match="needs model.variant=nested"):
        tiny("optim.second_order=true")
