"""Loss and gradients of every layout equal those of one process."""

import pytest
import torch
import torch.distributed as dist

from nlscale.config.run import Run
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.exact import exact_loss
from tests.sampled import sampled
from tests.tiny import micro_batches, tiny
from tests.whole import Pieces, assemble

LAYOUTS = {
    "tensor": (2, ["parallel.tensor=2"]),
    "tensor-sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tensor-pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tensor-sequence-interleaved": (
        4,
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    ),
    "recompute": (1, ["train.recompute=block"]),
}


def gradients(run: Run, dtype: torch.dtype) -> tuple[float, Pieces]:
    """Loss a token and gradients of one global batch, summed over replicas."""
    world = join(run.parallel, run.cluster, run.train.seed)
    model = parallelize(run, world, dtype)
    if dtype == torch.float64:
        exact_loss(model, world)
    total = model.forward_backward(micro_batches(run, 0, world.replica, world.replicas), True)
    dist.all_reduce(total)
    pieces = {}
    for leaf in model.leaves:
        assert leaf.parameter.grad is not None, leaf.name
        grad = leaf.of(leaf.parameter.grad).clone()
        if leaf.partial:
            dist.all_reduce(grad, group=world.tensor)
        dist.all_reduce(grad, group=world.data)
        pieces[leaf.name] = (grad, leaf.shard, world.tensor_rank)
    return (total[0] / total[1]).item(), pieces


@pytest.fixture(scope="module")
def one() -> dict:
    """Results of one process, by variant and precision."""
    cases = [(v, d) for v in ("independent", "sequential") for d in (torch.float32, torch.float64)]
    return {(v, d): ranks(1, gradients, tiny(f"model.variant={v}"), d)[0] for v, d in cases}


@pytest.mark.parametrize("variant", ["independent", "sequential"])
@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.float64], [torch.float32]))
@pytest.mark.parametrize("layout", [*LAYOUTS, "data", "tensor-data", "pipeline-data"])
def test_layout_equals_one_process(one: dict, layout: str, variant: str, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    base = layout.removesuffix("-data") if layout != "data" else None
    count, overrides = LAYOUTS[base] if base else (1, [])
    count *= 2 if layout.endswith("data") else 1
    results = ranks(count, gradients, tiny(f"model.variant={variant}", *overrides), dtype)
    loss, expected = one[variant, dtype][0], assemble([one[variant, dtype][1]])
    assert all(abs(result[0] - loss) < tolerance * loss for result in results)
    actual = assemble([result[1] for result in results])
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= tolerance * grad.norm(), name
