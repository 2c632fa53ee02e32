"""The walk with HOPE's main memory on chip, on one GPU: every config against float64, the same bits twice, in a graph."""

import pytest
import torch
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.self_modifying import Gates, Memories, Tokens, resident, self_modifying
from nlscale_kernels.self_modifying import triton_backward as kernels
from nlscale_kernels.self_modifying.given import DIFFERENTIABLE, Given
from nlscale_kernels.switch import kernels as switch
from nlscale_kernels.tune import walk_of
from nlscale_kernels.tuned import device_facts
from torch import Tensor

pytestmark = pytest.mark.gpu
LIMIT = 2e-2  # relative norm of eight chunks in a row: products are tf32


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the operator may be taken is what these find out (resident.able)."""
    monkeypatch.setattr(resident, "able", lambda index: True)


def given(documents: bool, momentum: bool = True, clip: bool = True, last: bool = False, width: int = 64) -> Given:
    """`last`: the last chunk is not written."""
    if device_facts(torch.cuda.current_device())[1] < 90:
        pytest.skip("before sm_90 the memory goes chunk by chunk")
    this = walk_of(2, 3, 8, 64, width, "cuda")
    if not momentum:
        this = this._replace(hold=None, up_speed=None, down_speed=None)
    if last:
        cut = {name: getattr(this, name) for name in ("reach", "write", "hold")}
        this = this._replace(**{name: None if x is None else x[:, :, :-64] for name, x in cut.items()})
        this = this._replace(turn=this.turn[:, :, :-1], factors=this.factors[:, :, :-1])
    this = this._replace(clip=1.0 if clip else 0.0)
    if not documents:
        return this
    starts = torch.zeros(2, 512, dtype=torch.bool, device="cuda")
    starts[0, [70, 300]] = starts[1, 128] = True
    fresh = torch.cat([part.cumsum(-1) > 0 for part in starts.split(64, 1)], 1)
    factors = this.factors.clone()
    factors[..., 1:] *= (~fresh[:, 63::64])[:, None, : factors.shape[2], None]
    return this._replace(fresh=fresh, factors=factors)


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "documents"])
@pytest.mark.parametrize(("momentum", "clip", "last"), [(True, True, False), (False, True, True), (False, False, True)])
@pytest.mark.parametrize("width", [64, 33])
def test_the_walk_by_every_config(width: int, momentum: bool, clip: bool, last: bool, documents: bool) -> None:
    this = given(documents, momentum, clip, last, width)
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
            if name == "factors" and this.fresh is not None:  # those of zeros: nothing goes on where a document begins
                alive = (~this.fresh[:, 63::64])[:, None, : right.shape[2], None]
                found, right = (torch.cat([d[..., :1], d[..., 1:] * alive], -1) for d in (found, right))
            assert float((found - right).norm()) <= LIMIT * float(right.norm()), name


def test_memories_on_chip_are_memories_by_chunks() -> None:
    """The whole of self-modifying Titans and its gradients, by kernels and by the references."""
    given(False)
    generator = torch.Generator("cuda").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    def net(count: int, out: int) -> Net:
        return Net(0.12 * numbers(1, 3, count, 64, 64), 0.05 * numbers(1, 3, count, out, 64))

    memories = Memories(net(2, 64), net(2, 1), net(1, 64))
    q = torch.nn.functional.normalize(numbers(2, 3, 512, 64), dim=-1)
    tokens = Tokens(numbers(2, 3, 512, 64), q, torch.nn.functional.logsigmoid(numbers(2, 3, 512)))
    gates = Gates(torch.zeros(3, device="cuda"), torch.full((3,), 4.6, device="cuda"), 0.02, clip=1.0)
    leaves = [x.requires_grad_() for x in (tokens.x, *(part for each in memories for part in each))]
    found = []
    for which in ("fused", "reference"):
        with switch(which):
            o, _ = self_modifying(tokens, (256, 64), memories, gates, recompute=True)
            found.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for mine, right in zip(*found, strict=True):
        assert float((mine - right).norm() / right.norm()) <= LIMIT


def test_the_walk_in_a_captured_graph_and_switched_off() -> None:
    this = given(False)
    assert resident.fits(this.q, Net(this.up.unsqueeze(2), this.down.unsqueeze(2)), 8)
    said = resident.resident(*this)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = resident.resident(*this)[0]
    graph.replay()
    assert torch.equal(captured, said)
    with switch("reference"):
        assert not resident.fits(this.q, Net(this.up.unsqueeze(2), this.down.unsqueeze(2)), 8)
