"""How far a level moved, told by its rules block by block, is how far its weights moved; masters are what is published."""

import pytest
import torch

from nlscale.config.levels import level_of
from nlscale.testing import ranks
from tests.optim.driver import CONSTANT, Pieces, built, usual, weights
from tests.sampled import sampled
from tests.tiny import tiny
from tests.whole import assemble

LAYOUTS = {
    "one": (1, []),
    "data": (2, []),
    "tensor-data": (4, ["parallel.tensor=2"]),
    "tied-pipeline": (2, ["parallel.pipeline=2", "model.tied=true"]),
    "overlap": (2, ["optim.overlap=true"]),
    "nested": (2, ["model.variant=nested", "optim.slow_weight=0"]),
}


def last_move(overrides: list[str]) -> tuple[dict[str, float], Pieces, Pieces, int]:
    """Squares that this rank told in step 4, when all levels are due; weights before and after; parts that rules wrote."""
    run = tiny(*overrides)
    world, model, optimizer = built(run, None if "train.precision=bf16" in overrides else torch.float64)
    squares, before, written = {}, {}, 0
    for step in range(1, 5):
        before = weights(model, world)
        moved = optimizer.step(step, model.forward_backward(usual(run, step, world), True)[2].long())
        squares = {name: float(each.update_square) for name, each in moved.items()}
        optimizer.arrive()
    for shard in optimizer.shards():
        for part, rule in zip(shard.parts, shard.rules, strict=True):
            assert torch.equal(part, rule.master.to(part.dtype))
            written += rule.copy is not None
    return squares, before, weights(model, world), written


@pytest.mark.parametrize("rule", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("layout", sampled(LAYOUTS, ("one", "data", "data4")))
def test_what_rules_tell_is_how_far_weights_moved(layout: str, rule: str) -> None:
    count, overrides = LAYOUTS[layout]
    overrides = [*overrides, f"optim.name={rule}", *CONSTANT, "optim.lr=0.01"]
    found = ranks(count, last_move, overrides)
    old, new = (assemble([each[place] for each in found]) for place in (1, 2))
    levels = tiny(*overrides).levels
    for level in levels:
        told = sum(squares[level.name] for squares, *_ in found)
        names = [name for name in old if level_of(name, levels) is level]
        moved = sum(float((new[name] - old[name]).double().square().sum()) for name in names)
        if layout != "nested":  # there a reset follows the move
            assert moved > 0 and told == pytest.approx(moved, rel=1e-9), level.name


@pytest.mark.parametrize("layout", ["data", "tensor-data", "nested"])
def test_rules_write_what_is_published(layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    assert all(written > 0 for *_, written in ranks(count, last_move, [*overrides, "train.precision=bf16"]))
