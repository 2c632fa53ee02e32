"""A micro-batch whose loss is not finite adds nothing to any window; every rank agrees, and the mean stays exact."""

import math

import pytest
import torch

from nlscale.config.run import Run
from nlscale.runtime.world import World
from nlscale.testing import ranks
from tests.optim.driver import built, usual
from tests.tiny import tiny
from tests.whole import Pieces, assemble

LAYOUTS = {
    "one": (1, []),
    "data": (2, []),
    "tensor-sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tensor-pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "recompute": (1, ["train.recompute=block"]),
    "eager": (2, ["optim.reduce=eager"]),
    "bf16": (1, ["train.precision=bf16"]),
}
BAD = 2  # the step at which a row's logits overflow, inside the windows of both slow levels
POISON = 127  # a token whose embedding is not finite


def rows(run: Run, step: int, world: World, poisoned: bool) -> list:
    """The usual micro-batches. At one step the last of replica 0 has the poison, or no targets at all."""
    batches = list(usual(run, step, world))
    for tokens, targets, _ in batches:
        targets[tokens == POISON] = -1
        tokens[tokens == POISON] = 5
    if step == BAD and world.replica == 0:
        tokens, targets, _ = batches[-1]
        if poisoned:
            tokens[0, 7] = POISON
        else:
            targets.fill_(-1)
    return batches


def learned(overrides: list[str], poisoned: bool) -> tuple[Pieces, list[float]]:
    """Weights after four steps, and the micro-batches that this rank refused in each."""
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    infinite = next((leaf for leaf in model.leaves if leaf.name == "embed.weight"), None)
    refused = []
    for step in range(1, 5):
        if infinite is not None:
            put(infinite.value, world, torch.inf)
        total = model.forward_backward(rows(run, step, world, poisoned), True)
        if infinite is not None:
            put(infinite.value, world, 0.0)
        refused.append(float(total[3]))
        moved = optimizer.step(step, total[2].long())
        assert not any(move.skipped for move in moved.values())
    if infinite is not None:
        put(infinite.value, world, 0.0)
    return {x.name: (x.value.clone(), x.shard, world.tensor_rank) for x in model.leaves}, refused


def put(embedding: torch.Tensor, world: World, value: float) -> None:
    """Sets the poison's row, wherever this rank's vocabulary begins."""
    row = POISON - world.tensor_rank * len(embedding)
    if 0 <= row < len(embedding):
        embedding[row] = value


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_micro_batch_adds_nothing(layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    poisoned, without = (ranks(count, learned, overrides, bad) for bad in (True, False))
    for rank, (_, refused) in enumerate(poisoned):
        hit = "data" not in layout and layout != "eager" or rank == 0
        assert refused == [0, float(hit), 0, 0]
    assert all(refused == [0, 0, 0, 0] for _, refused in without)
    clean, expected = assemble([r[0] for r in poisoned]), assemble([r[0] for r in without])
    for name, weight in expected.items():
        assert torch.equal(clean[name], weight), name
        assert math.isfinite(float(weight.float().norm()))


def test_a_bad_micro_batch_adds_nothing_to_what_layers_read() -> None:
    ((weights, refused),) = ranks(1, learned, ["optim.name=dgd"], True)
    assert refused == [0, 1, 0, 0]
    assert all(math.isfinite(float(weight.norm())) for weight, _, _ in weights.values())


def late(overrides: list[str]) -> list[tuple[list[str], list[str], bool]]:
    """Groups that moved and that skipped after a gradient that is not finite although its loss was."""
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    seen = []
    for step in range(1, 5):
        total = model.forward_backward(usual(run, step, world), True)
        if step == BAD - 1 and world.rank == world.size - 1:
            for name in ("slow", "long"):  # both stay open; the first is due next and the other must not wait for it
                spoilt = next(leaf for leaf in model.leaves if f".{name}.up." in leaf.name)
                optimizer.windows.of(spoilt).view(-1)[0] = torch.nan
        moved = optimizer.step(step, total[2].long())
        finite = all(bool(leaf.value.isfinite().all()) for leaf in model.leaves)
        names = list(moved)
        seen.append(([n for n in names if not moved[n].skipped], [n for n in names if moved[n].skipped], finite))
    return seen


@pytest.mark.parametrize("layout", ["one", "data", "tensor-sequence", "pipeline", "eager"])
def test_all_ranks_drop_a_window_that_is_not_finite(layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    every = ranks(count, late, overrides)
    assert all(seen == every[0] for seen in every)
    assert all(finite for _, _, finite in every[0])
    moved, skipped = [step[0] for step in every[0]], [step[1] for step in every[0]]
    assert skipped == [[], ["slow"], [], []]
    assert moved[1] == ["fast"] and set(moved[3]) == {"fast", "slow", "long"}  # what was dropped began anew
