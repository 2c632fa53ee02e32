"""What a block holds for backward where it is computed again: its input, whatever the mixer recomputes inside."""

import gc

import pytest
import torch

from nlscale.config.run import Run
from nlscale.config.shapes import MIXERS
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.tiny import micro_batches, tiny

SMALL = ["model.layers=1", "data.sequence=64", "model.linear.chunk=8", "model.titans.chunk=8"]
SMALL += ["model.written.chunk=8"]
SMALL += ["model.self_modifying.chunk=8", "model.self_modifying.maker_chunk=32"]


def held(run: Run) -> tuple[int, list[float]]:
    """Bytes of tensors that came with a block's forward pass and are still there, and the gradient of the block's input."""
    hope = parallelize(run, join(run.parallel, run.cluster, 0)).chunks[0]
    tokens, _, starts = micro_batches(run, 0, 0, 1)[0]
    x, scene = hope.enter(tokens).detach().requires_grad_(), hope.scene(starts)
    gc.collect()
    gc.disable()
    before = {id(each) for each in gc.get_objects()}
    y, _ = hope.blocks[0](x, scene)
    found = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if isinstance(each, torch.Tensor) and id(each) not in before
    }
    (slope,) = torch.autograd.grad(y.square().sum(), x)
    return sum(found.values()), slope.flatten().tolist()


@pytest.mark.parametrize("mixer", [*MIXERS, "self_modifying model.self_modifying.per_layer=true"])
def test_a_block_that_is_computed_again_holds_its_input_alone(mixer: str) -> None:
    (kept, plain), (left, again) = (
        ranks(1, held, tiny(*SMALL, *f"model.mixer={mixer}".split(), f"train.recompute={policy}"))[0]
        for policy in ("none", "block")
    )
    assert left <= 2 * 64 * 32 * 4 < kept  # the block's output, which is the next one's input
    assert again == plain
