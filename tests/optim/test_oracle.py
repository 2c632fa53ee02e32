"""Levels over ranks equal a plain torch AdamW a level on one process, step by step."""

import pytest
import torch
import torch.distributed as dist

from nlscale.config.levels import Level, level_of
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.optim.build import build_optimizer
from nlscale.optim.levels import decays
from nlscale.optim.schedule import level_rate
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.sampled import sampled
from tests.tiny import micro_batches, tiny
from tests.whole import Pieces, assemble

STEPS = 10


def train(run: Run) -> tuple[list[float], Pieces, list[float]]:
    """Losses, final weights and norms of the fast level's windows."""
    world = join(run.parallel, run.cluster, run.train.seed)
    model = parallelize(run, world)
    optimizer = build_optimizer(run, model.leaves, world, STEPS)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        batches = micro_batches(run, step, world.replica, world.replicas)
        total = model.forward_backward(batches, True)
        moved = optimizer.step(step, total[2].long())
        norms.append(float(moved["fast"].grad_norm))
        dist.all_reduce(total)
        losses.append((total[0] / total[1]).item())
    return losses, {x.name: (x.value.clone(), x.shard, world.tensor_rank) for x in model.leaves}, norms


def oracle(run: Run) -> tuple[list[float], dict, list[float]]:
    """One process; a torch AdamW over each level's leaves; the mean of the window; clip by the level's norm."""
    world = join(run.parallel, run.cluster, run.train.seed)
    model = parallelize(run, world)
    own = {leaf.name: leaf.value.clone().requires_grad_() for leaf in model.leaves}
    sums = {name: torch.zeros_like(value) for name, value in own.items()}
    optimizers, tokens = {}, {level.name: 0 for level in run.levels}
    for level in run.levels:
        names = [name for name in own if level_of(name, run.levels) is level]
        o = run.optim
        groups = [
            {"params": [own[n] for n in names if decays(n) == decay], "weight_decay": o.weight_decay * decay}
            for decay in (True, False)
        ]
        optimizers[level.name] = (names, torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps, foreach=False))
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        batches = micro_batches(run, step, 0, 1)
        for leaf in model.leaves:
            leaf.parameter.grad = None
            leaf.value.copy_(own[leaf.name].detach())
        total = model.forward_backward(batches, True)
        losses.append((total[0] / total[1]).item())
        for leaf in model.leaves:
            sums[leaf.name] += leaf.of(leaf.parameter.grad)
        for level in run.levels:
            tokens[level.name] += int(total[1])
            if step % level.period:
                continue
            names, adam = optimizers[level.name]
            for name in names:
                own[name].grad = sums[name] / tokens[level.name]
                sums[name] = torch.zeros_like(sums[name])
            norm = torch.nn.utils.clip_grad_norm_([own[n] for n in names], run.optim.clip)
            for group in adam.param_groups:
                group["lr"] = level_rate(run.optim, level, step, STEPS)
            adam.step()
            tokens[level.name] = 0
            if level.name == "fast":
                norms.append(float(norm))
    return losses, {name: value.detach() for name, value in own.items()}, norms


@pytest.fixture(scope="module")
def expected() -> dict:
    return {variant: ranks(1, oracle, tiny(f"model.variant={variant}"))[0] for variant in ("independent", "sequential")}


LAYOUTS = {
    "one": (1, []),
    "data": (2, []),
    "tensor": (2, ["parallel.tensor=2"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "tensor-sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tensor-data": (4, ["parallel.tensor=2"]),
    "pipeline-data": (4, ["parallel.pipeline=2"]),
    "tensor-pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "context": (2, ["parallel.context=2"]),
    "context-data": (4, ["parallel.context=2"]),
    "interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


CASES = [(layout, variant) for layout in LAYOUTS for variant in ("independent", "sequential")]
KEPT = [(layout, "independent") for layout in ("one", "tensor-data", "pipeline-data", "context", "interleaved")]
KEPT += [(layout, "sequential") for layout in ("tensor-sequence", "tensor-pipeline", "context-data")]


@pytest.mark.parametrize(("layout", "variant"), sampled(CASES, [each for each in CASES if each not in KEPT]))
def test_levels_equal_one_adamw_a_level(expected: dict, layout: str, variant: str) -> None:
    count, overrides = LAYOUTS[layout]
    losses, weights, norms = expected[variant]
    results = ranks(count, train, tiny(f"model.variant={variant}", *overrides))
    for result in results:
        assert result[0] == pytest.approx(losses, rel=1e-5)
        assert result[2] == pytest.approx(norms, rel=1e-4)
    actual = assemble([result[1] for result in results])
    assert actual.keys() == weights.keys()
    for name, weight in weights.items():
        assert (actual[name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_first_level_owns_what_no_continuum_names() -> None:
    levels = [Level(name="fast", width=0.5), Level(name="slow", period=4, width=0.5)]
    table = {
        "embed.weight": "fast",
        "blocks.3.mix.q.weight": "fast",
        "blocks.11.continuum.norm.weight": "fast",
        "blocks.11.continuum.slow.up.weight": "slow",
        "blocks.0.continuum.slow.norm.weight": "slow",
    }
    assert {name: level_of(name, levels).name for name in table} == table


def test_reading_a_recipe_gives_the_levels_as_written() -> None:
    assert [(x.name, x.period) for x in read("demo").levels] == [("fast", 1), ("medium", 4), ("slow", 16), ("long", 64)]
