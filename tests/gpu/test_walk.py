"""The walk with HOPE's main memory on chip, on one GPU: every config against float64, the same bits twice, in a graph."""

import pytest
import torch
from nlscale_kernels.self_modifying import resident
from nlscale_kernels.self_modifying import triton_backward as kernels
from nlscale_kernels.self_modifying.resident import DIFFERENTIABLE, Given
from nlscale_kernels.switch import kernels as switch
from nlscale_kernels.tune import walk_of
from nlscale_kernels.tuned import device_facts
from torch import Tensor

pytestmark = pytest.mark.gpu
LIMIT = 2e-2  # relative norm of eight chunks in a row: products are tf32


def given(documents: bool) -> Given:
    if device_facts(torch.cuda.current_device())[1] < 90:
        pytest.skip("before sm_90 the memory goes chunk by chunk")
    this = walk_of(2, 3, 8, 64, 64, "cuda")
    if not documents:
        return this
    starts = torch.zeros(2, 512, dtype=torch.bool, device="cuda")
    starts[0, [70, 300]] = starts[1, 128] = True
    fresh = torch.cat([part.cumsum(-1) > 0 for part in starts.split(64, 1)], 1)
    factors = this.factors.clone()
    factors[..., 1:] *= (~fresh[:, 63::64])[:, None, :, None]
    return this._replace(fresh=fresh, factors=factors)


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "documents"])
def test_the_walk_by_every_config(documents: bool) -> None:
    this = given(documents)
    wide = Given._make(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in this)
    expected = resident.looped(wide)
    of = [torch.randn_like(x) for x in expected]
    theirs = dict(zip(DIFFERENTIABLE, resident.gradients(wide, of), strict=True))
    narrow = [x.float() for x in of]
    for config in kernels.FORWARD:
        mine, again = (kernels.walked(this, config) for _ in range(2))
        for found, twice, right in zip(mine, again, expected, strict=False):
            assert torch.equal(found, twice) and float((found - right).norm() / right.norm()) <= LIMIT
    for config in kernels.BACKWARD:
        first, second = (kernels.gradients(this, mine.kept, narrow, config) for _ in range(2))
        for name, found, twice in zip(DIFFERENTIABLE, first, second, strict=True):
            right = theirs[name]
            assert torch.equal(found, twice)
            assert name == "factors" or float((found - right).norm()) <= LIMIT * float(right.norm()), name


def test_the_walk_in_a_captured_graph_and_switched_off() -> None:
    this = given(False)
    assert resident.fits(this.q, resident.Net(this.up.unsqueeze(2), this.down.unsqueeze(2)), 8)
    said = resident.resident(*this)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = resident.resident(*this)[0]
    graph.replay()
    assert torch.equal(captured, said)
    with switch("reference"):
        assert not resident.fits(this.q, resident.Net(this.up.unsqueeze(2), this.down.unsqueeze(2)), 8)
