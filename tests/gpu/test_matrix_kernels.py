"""Matrix memories and the solve of self-modifying Titans on one GPU: every config, rule, chunk and dtype against float64."""

import itertools

import pytest
import torch
from nlscale_kernels import linear_memory
from nlscale_kernels.linear_memory import Tokens
from nlscale_kernels.linear_memory import reference as memories
from nlscale_kernels.linear_memory import triton as forward
from nlscale_kernels.linear_memory import triton_backward as backward
from nlscale_kernels.linear_memory.memory import prepared
from nlscale_kernels.linear_memory.reference import Given, Gradients
from nlscale_kernels.self_modifying import op as reach
from nlscale_kernels.self_modifying import triton as reach_kernels
from nlscale_kernels.switch import kernels
from nlscale_kernels.tuned import device_facts
from torch import Tensor

pytestmark = pytest.mark.gpu
LIMITS = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # relative norms; float32 multiplies as tf32
NAMED = ("o", "last", *Gradients._fields)
KNOWN = (
    forward.APPLY,
    forward.STATES,
    forward.OUTPUTS,
    backward.LISTEN,
    backward.CARRY,
    backward.READ,
    backward.SPREAD,
)


def relative(given: Tensor, expected: Tensor) -> float:
    return float((given.double() - expected.double()).norm() / expected.double().norm())


WAYS = [(dtype, rule, documents) for dtype in LIMITS for rule in ("delta", "linear") for documents in (False, True)]
WAYS += [(dtype, rule, True) for dtype in (torch.float32, torch.bfloat16) for rule in ("delta_frozen", "dgd_frozen")]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("dtype", "rule", "documents"), WAYS)
def test_matrix_memory_by_every_config(dtype: torch.dtype, rule: str, documents: bool, width: int) -> None:
    """Each config in turn, the others as they are chosen: against float64, and the same bits twice."""
    given, d_o, d_last = memory(rule, dtype, documents, width)
    expected = exact(given, d_o, d_last)
    arch = device_facts(torch.cuda.current_device())[1]
    fitting = [[each for each in known if each.least <= arch] for known in KNOWN]
    for place in range(max(map(len, fitting))):
        apply, states, outputs, listen, carry, read, spread = (known[min(place, len(known) - 1)] for known in fitting)
        found = [
            (
                *forward.matrix_memory(given, (apply, states, outputs)),
                *backward.gradients(given, d_o, d_last, (listen, carry, read, spread, apply)),
            )
            for _ in range(2)
        ]
        for name, mine, again, theirs in zip(NAMED, *found, expected, strict=True):
            assert torch.equal(mine, again), name
            assert not theirs.norm() or relative(mine, theirs) <= LIMITS[dtype], (name, place)


def exact(given: Given, d_o: Tensor, d_last: Tensor) -> tuple[Tensor, ...]:
    """What comes out in float64, gradients included."""
    wide = Given(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given))
    return *memories.matrix_memory(wide), *memories.gradients(wide, d_o.double(), d_last.double())


@pytest.mark.parametrize(("chunk", "width"), [(16, 128), (32, 64), (24, 40), (48, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["delta", "dgd_frozen"])
def test_matrix_memory_of_other_chunks_and_widths(rule: str, dtype: torch.dtype, chunk: int, width: int) -> None:
    """Those that the tiles of a chunk of 64 would not show, and some that no tile divides."""
    given, d_o, d_last = memory(rule, dtype, True, width, chunk, 10 * chunk)
    found = (*forward.matrix_memory(given), *backward.gradients(given, d_o, d_last))
    for name, mine, theirs in zip(NAMED, found, exact(given, d_o, d_last), strict=True):
        assert not theirs.norm() or relative(mine, theirs) <= LIMITS[dtype], name


def memory(
    rule: str, dtype: torch.dtype, documents: bool, width: int, chunk: int = 64, T: int = 512
) -> tuple[Given, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    B, H = 2, 3
    starts = (numbers(B, T) > 2.3) if documents else None
    rate, keep = 0.5 * torch.sigmoid(numbers(B, H, T)), torch.nn.functional.logsigmoid(numbers(B, H, T) + 3)
    q, k, v = (
        numbers(B, H, T, width),
        torch.nn.functional.normalize(numbers(B, H, T, width), dim=-1),
        numbers(B, H, T, width),
    )
    tokens, initial = Tokens(q, k, v, rate, keep, starts), 0.1 * numbers(H, width, width)
    given = prepared(rule, tokens, chunk, initial, 0.1 * numbers(B, H, width, width)).given
    given = given._replace(q=given.q.to(dtype), k=given.k.to(dtype), v=given.v.to(dtype))
    return given, numbers(B, H, T, width).to(dtype), numbers(B, H, width, width)


def test_matrix_memory_is_differentiated_and_captured() -> None:
    given, d_o, d_last = memory("delta", torch.float32, True, 64)
    leaves = Given(*(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given))
    o, last = linear_memory.matrix_memory(leaves)
    (d_k,) = torch.autograd.grad([o, last], leaves.k, [d_o, d_last])
    with kernels("reference"):
        expected = torch.autograd.grad(linear_memory.matrix_memory(leaves), leaves.k, [d_o, d_last])[0]
    assert relative(d_k, expected) <= LIMITS[torch.float32]
    plain = Given(*(x.detach() if isinstance(x, Tensor) else x for x in given))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = forward.matrix_memory(plain)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, o.detach())


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("chunk", [64, 128])
def test_reach_by_every_config(chunk: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    k = torch.nn.functional.normalize(numbers(2, 3, chunk, 64), dim=-1).to(dtype)
    log = -0.05 * numbers(2, 3, chunk).abs()
    total = log.cumsum(-1)
    document = (numbers(2, chunk) > 2).cumsum(-1).int()
    scalars = (numbers(2, 3, chunk).sigmoid() / 2, total - log, total, (total[..., -1:] - total).exp2())
    given, of = reach.Given(k, *scalars, document), numbers(2, 3, chunk, 64).to(dtype)
    exact = reach.Given._make(x.double() if x.is_floating_point() else x for x in given)
    said = reach.reached(exact)
    expected, arch = (said, *reach.gradients(exact, said, of.double())), device_facts(torch.cuda.current_device())[1]
    fitting = [[each for each in known if each.least <= arch] for known in (forward.APPLY, reach_kernels.GRADIENT)]
    for apply, gradient in itertools.product(*fitting):
        mine, again = (
            (
                reach_kernels.reach(given, apply),
                *reach_kernels.gradients(given, said.to(dtype), of, (apply, gradient)),
            )
            for _ in range(2)
        )
        for found, twice, theirs in zip(mine, again, expected, strict=True):
            assert torch.equal(found, twice) and relative(found, theirs) <= LIMITS[dtype]
