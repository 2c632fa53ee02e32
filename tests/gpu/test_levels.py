"""Levels on one GPU: the same numbers as on the host, no waiting, and the memory of the formula."""

import pytest
import torch

from nlscale.runtime.world import leave
from tests.optim.driver import built, usual
from tests.tiny import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    """Weights after 8 steps of several configurations, one after another in this process."""
    found = {}
    for name, overrides in (
        ("plain", []),
        ("offload", ["optim.offload=2"]),
        ("eager", ["optim.reduce=eager"]),
        ("overlap", ["optim.overlap=true"]),
    ):
        run = tiny(*overrides)
        world, model, optimizer = built(run)
        optimizer.await_in(model.modules)
        for step in range(1, 9):
            batches = [tuple(t.to(world.device) for t in batch) for batch in usual(run, step, world)]
            optimizer.step(step, model.forward_backward(batches, True)[2].long())
        optimizer.arrive()
        found[name] = {leaf.name: leaf.value.cpu().clone() for leaf in model.leaves}
        leave()
    return found


@pytest.mark.parametrize("name", ["offload", "eager", "overlap"])
def test_where_state_lies_does_not_matter(name: str, weights: dict) -> None:
    for leaf, expected in weights["plain"].items():
        assert (weights[name][leaf] - expected).norm() <= 1e-5 * expected.norm(), leaf
