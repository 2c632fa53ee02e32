"""The identities that a multi-frequency optimizer must keep (spec 3.11), each against an independent form."""

import pytest
import torch

from nlscale.config.run import Run
from nlscale.optim.reduce import POLICIES
from nlscale.runtime.world import World
from nlscale.testing import ranks
from tests.optim.driver import (
    CONSTANT,
    LAYOUTS,
    built,
    digest,
    over_replicas,
    run_steps,
    state_tensors,
    usual,
)
from tests.sampled import alone, sampled
from tests.tiny import tiny
from tests.whole import assemble

ONE_PART = "levels=[{name: all, period: %d, width: 1.0}]"
THREE_PARTS = (
    "levels=[{name: all, period: %d, width: 1.0}, "
    "{name: late, period: %d, width: 0, match: ['blocks.2.*', 'blocks.3.mix.*']}, "
    "{name: end, period: %d, width: 0, match: ['blocks.3.continuum.*', head.weight]}]"
)
SINGLE = (torch.float32, 1e-5)
STAGGERED = "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 4, width: 0.5}]"


def furthest(a: dict, b: dict) -> float:
    """Largest relative difference of any tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", sampled(["one", "data", "tensor-data", "pipeline-data"], ["data", "tensor-data"]))
def test_i1_all_periods_one_is_the_optimizer_without_levels(layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    rules = [*overrides, "optim.clip_scope=global_due", "optim.clip=0.05"]
    one = assemble(ranks(count, run_steps, [ONE_PART % 1, *rules]))
    three = assemble(ranks(count, run_steps, [THREE_PARTS % (1, 1, 1), *rules]))
    assert equal(one, three)
    assert not equal(one, assemble(ranks(count, run_steps, [ONE_PART % 1, *rules, "optim.clip=0"])))  # it clips


def test_i1_over_four_replicas() -> None:
    """Four terms are added in an order that depends on who owns their sum, so bits may differ; numbers may not."""
    rules = ["optim.clip_scope=global_due"]
    one = assemble(ranks(4, run_steps, [ONE_PART % 1, *rules], 8, torch.float64))
    assert furthest(assemble(ranks(4, run_steps, [THREE_PARTS % (1, 1, 1), *rules], 8, torch.float64)), one) < 1e-12


def accumulated(run: Run, step: int, world: World) -> list:
    """The micro-batches of four steps as one."""
    return [batch for k in range(4 * step - 3, 4 * step + 1) for batch in usual(run, k, world)]


ACCUMULATED = [(layout, parts) for layout in ("one", "data") for parts in ("one", "three")]


@pytest.mark.parametrize(("layout", "parts"), sampled(ACCUMULATED, [("one", "three"), ("data", "one")]))
def test_i2_equal_periods_are_gradient_accumulation(layout: str, parts: str) -> None:
    levels = {"one": ONE_PART, "three": THREE_PARTS}[parts]
    count, overrides = LAYOUTS[layout]
    rules = [*overrides, *CONSTANT, "optim.kappa=0", "optim.clip_scope=global_due", "optim.clip=0.05"]
    period = levels % ((4,) if levels is ONE_PART else (4, 4, 4))
    slow = assemble(ranks(count, run_steps, [period, *rules], 8))
    plain = assemble(ranks(count, run_steps, [ONE_PART % 1, *rules], 2, None, accumulated))
    assert equal(slow, plain)


@pytest.mark.parametrize("policy", ["eager", "hierarchical"])
@pytest.mark.parametrize(("dtype", "limit"), sampled([(torch.float64, 1e-12), SINGLE], [SINGLE]))
def test_i3_it_does_not_matter_when_gradients_cross_ranks(policy: str, dtype: torch.dtype, limit: float) -> None:
    deferred = assemble(ranks(4, run_steps, [], 8, dtype))
    other = assemble(ranks(4, run_steps, [f"optim.reduce={policy}", "optim.node=2"], 8, dtype))
    assert furthest(other, deferred) < limit


def histories(overrides: list[str]) -> list[dict[str, str]]:
    """Digests of every tensor of every level after each of 8 steps; equal on all replicas where all hold it whole."""
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    seen = []
    for step in range(1, 9):
        optimizer.step(step, model.forward_backward(usual(run, step, world), True)[2].long())
        digests = {name: digest(t) for name, t in state_tensors(model, optimizer, world).items()}
        computes = {name: value for name, value in digests.items() if name.startswith("compute/")}
        assert all(other == computes for other in over_replicas(world, computes))
        seen.append(digests)
    return seen


CHANGES = [(policy, layout) for policy in POLICIES for layout in ("data", "tensor-data", "pipeline-data")]
KEPT = [("defer", "tensor-data"), ("eager", "pipeline-data"), ("hierarchical", "data")]


@pytest.mark.parametrize(("policy", "layout"), sampled(CHANGES, [each for each in CHANGES if each not in KEPT]))
def test_i4_a_tensor_changes_at_its_boundaries_and_never_between(policy: str, layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    period = {"fast": 1, "slow": 2, "long": 4}
    for history in ranks(count, histories, [*overrides, f"optim.reduce={policy}"]):
        for name in history[0]:
            level = name.split(".")[3] if ".continuum." in name and "continuum.norm" not in name else "fast"
            changed = [k + 2 for k in range(7) if history[k][name] != history[k + 1][name]]
            assert changed == [step for step in range(2, 9) if step % period[level] == 0], name


@pytest.mark.parametrize("layout", sampled(LAYOUTS, ("one", "data", "tensor-data")))
def test_i5_ranks_do_not_matter(layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    limit = 1e-6 if "tensor" in layout else 1e-12  # megatron-core's vocabulary-parallel loss computes in float32
    one = alone((STAGGERED, "optim.phase=staggered"), 8, torch.float64)
    many = ranks(count, run_steps, [STAGGERED, "optim.phase=staggered", *overrides], 8, torch.float64)
    assert furthest(assemble(many), one) < limit


def ragged(run: Run, step: int, world: World) -> list:
    """Micro-batches of which replica 0 has most targets, and one that has none."""
    batches = list(usual(run, step, world))
    for k, (_, targets, _) in enumerate(batches):
        targets[:, 3 + 5 * world.replica + k :] = -1
    batches[1][1].fill_(-1)
    return batches


def one_by_one(run: Run, step: int, world: World) -> list:
    """The same rows on one replica."""
    replicas = [World(**{**world.__dict__, "replica": r, "replicas": 2, "copy": r, "copies": 2}) for r in range(2)]
    return [batch for replica in replicas for batch in ragged(run, step, replica)]


def test_i6_the_mean_counts_tokens_not_micro_batches() -> None:
    two = assemble(ranks(2, run_steps, [], 8, torch.float64, ragged))
    assert furthest(two, assemble(ranks(1, run_steps, [], 8, torch.float64, one_by_one))) < 1e-12


@pytest.mark.parametrize("bucket", [1, 20_000])
def test_buckets_do_not_matter(bucket: int) -> None:
    assert equal(assemble(ranks(2, run_steps, [], 8)), assemble(ranks(2, run_steps, [f"optim.bucket={bucket}"], 8)))
