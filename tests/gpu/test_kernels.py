"""Kernels on one GPU: every config against float64, the same bits twice, in a captured graph, beyond 2^31 elements."""

from collections.abc import Callable

import pytest
import torch
from nlscale_kernels import level_step, newton_schulz
from nlscale_kernels.level_step import AdamW, reference
from nlscale_kernels.mlp_memory import Step, glue
from nlscale_kernels.mlp_memory import op as mlp
from nlscale_kernels.mlp_memory import step as memory_step
from nlscale_kernels.newton_schulz import reference as products
from nlscale_kernels.newton_schulz import triton
from nlscale_kernels.switch import kernels
from nlscale_kernels.tuned import device_facts
from torch import Tensor

pytestmark = pytest.mark.gpu
ROWS = [AdamW.at(3, 0.02, (0.9, 0.95), 1e-8, 0.1, 0.25), AdamW.rest()]
NAMES = ("master", "first", "second")


def state(elements: int, narrow: torch.dtype = torch.bfloat16) -> dict[str, Tensor | None]:
    generator = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(elements, generator=generator, device="cuda") for _ in range(4)]
    given = {"master": made[0], "gradient": made[1].to(narrow), "first": made[2], "second": made[3].abs()}
    blocks = (torch.arange(-(-elements // level_step.BLOCK), device="cuda") % 3 == 1).int()
    return {**given, "copy": made[0].to(narrow), "table": level_step.table(ROWS, made[0]), "blocks": blocks}


def relative(given: Tensor, expected: Tensor) -> float:
    return float((given.double() - expected.double()).norm() / expected.double().norm())


def near(given: Tensor, expected: Tensor, limit: float) -> bool:
    return relative(given, expected) <= limit


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
def test_level_step_is_its_reference_and_the_same_twice(narrow: torch.dtype) -> None:
    mine, again, theirs = (state(2**20 + 77, narrow) for _ in range(3))
    wide = {name: value.double() if name in (*NAMES, "gradient", "table") else value for name, value in theirs.items()}
    told, said, expected = level_step.adamw(**mine), level_step.adamw(**again), reference.adamw(**wide)
    for name in NAMES:
        assert near(mine[name], wide[name], 1e-6)
        assert torch.equal(mine[name], again[name])
    assert near(told, expected, 1e-5)
    assert torch.equal(told, said) and torch.equal(mine["copy"], again["copy"])


def test_level_step_in_a_captured_graph_follows_its_table() -> None:
    """One graph, replayed: what fires is read on the device."""
    captured, plain = state(2**18), state(2**18)
    table = captured["table"]
    rest = level_step.table([AdamW.rest(), AdamW.rest()], captured["master"])
    moves = table.clone()
    table.copy_(rest)
    level_step.adamw(**captured)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        level_step.adamw(**captured)
    for step in range(3):
        table.copy_(moves if step == 1 else rest)
        graph.replay()
    level_step.adamw(**plain)
    assert all(torch.equal(captured[name], plain[name]) for name in NAMES)


def test_level_step_beyond_two_to_the_31() -> None:
    elements = 2**31 + 2**20
    if torch.cuda.mem_get_info()[0] < 18 * elements:
        pytest.skip("needs 38 GB of free memory on the GPU")
    master = torch.ones(elements, device="cuda")
    first, second = torch.zeros_like(master), torch.zeros_like(master)
    gradient = torch.ones(elements, device="cuda", dtype=torch.bfloat16)
    row = AdamW.at(1, 0.5, (0.9, 0.95), 1e-8, 0.0)
    level_step.adamw(master, gradient, first, second, None, level_step.table([row], master))
    assert float(master[-1]) == float(master[0]) == pytest.approx(0.5) and float(master.min()) == float(master.max())


CONFIGS = [pytest.param(config, id=str(place)) for place, config in enumerate(triton.CONFIGS)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 512, 512), (1, 333, 1000), (3, 1000, 130)])
def test_symmetric_product(config: object, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    if config.least > device_facts(torch.cuda.current_device())[1]:
        pytest.skip("this GPU has no room for the config")
    generator = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(shape, generator=generator, device="cuda") / shape[-1] ** 0.5).to(dtype)
    for each in (x, x.mT.contiguous().mT):
        given = triton.symmetric_product(each, each, config=config)
        assert near(given, products.symmetric_product(each.double(), each.double()), 4e-3)
        assert torch.equal(given, given.mT) and torch.equal(given, triton.symmetric_product(each, each, config=config))


@pytest.mark.parametrize("shape", [(1, 1024, 1024), (2, 1024, 4096), (1, 4096, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_is_its_polynomial_in_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda")
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    wide = x.double() if shape[1] <= shape[2] else x.double().mT
    expected = products.direct(wide, 5)
    assert near(newton_schulz.orthogonal(x.to(dtype), 5), expected if shape[1] <= shape[2] else expected.mT, 5e-2)


def test_float64_is_the_references_on_a_gpu_too() -> None:
    x = torch.randn(1, 40, 90, device="cuda", dtype=torch.float64)
    assert near(newton_schulz.symmetric_product(x, x), x @ x.mT, 1e-14)
    mine, theirs = ({**state(5000), "gradient": state(5000)["master"]} for _ in range(2))
    wide = [
        {name: each.double() if name not in ("copy", "blocks") else each for name, each in s.items()}
        for s in (mine, theirs)
    ]
    level_step.adamw(**wide[0])
    reference.adamw(**wide[1])
    assert torch.equal(wide[0]["master"], wide[1]["master"])


@pytest.mark.parametrize(
    "call", [lambda x: newton_schulz.symmetric_product(x, x), lambda x: newton_schulz.orthogonal(x, 5)]
)
def test_compiles_whole_and_is_switched_off(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 256, 512, device="cuda", dtype=torch.bfloat16) / 512
    assert near(torch.compile(call, fullgraph=True)(x), call(x), 1e-2)
    with kernels("reference"):
        assert near(call(x), call(x.double()), 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", glue.ACTIVATIONS)
def test_mlp_memory_operators(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    B, H, N, C, K, M, W = 2, 3, 2, 130, 64, 200, 2

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    wide = 2 * M if kind == "swiglu" else M
    before, inward, d_back = numbers(B, H, N, C, wide), numbers(B, H, N, C, M), numbers(B, H, N, C, wide)
    heard, target, key, weights = (
        numbers(B, H, N, C, K),
        numbers(B, H, 1, C, K),
        numbers(B, H, C, K),
        numbers(B, H, C, W),
    )
    calls = [
        (mlp.active, (before, kind)),
        (mlp.returned, (before, inward, d_back, kind)),
        (mlp.second, (before, inward, d_back, kind)),
        (mlp.errors, (heard, target, key, weights)),
        (mlp.of_errors, (numbers(B, H, N, C, W * K), heard, weights, target.expand_as(heard).contiguous())),
    ]
    for call, arguments in calls:
        wider = [x.double() if isinstance(x, Tensor) else x for x in arguments]
        mine, again, expected = (
            [x] if isinstance(x, Tensor) else x for x in (call(*arguments), call(*arguments), call(*wider))
        )
        for given, twice, theirs in zip(mine, again, expected, strict=True):
            assert torch.equal(given, twice) and given.dtype == dtype
            assert relative(given, theirs) <= {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [0.0, 20.0])
@pytest.mark.parametrize("units", [200, 700])  # one slice of a memory, and three
def test_memory_step(units: int, limit: float, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(2, 3, 2, units, 64, generator=generator, device="cuda").to(dtype) for _ in range(6)]
    keep, carry, left = (torch.rand(2, 3, generator=generator, device="cuda").to(dtype) for _ in range(3))
    this = Step(*weights[:4], keep, carry, left, -1.0, limit)
    exact = Step._make(x.double() if isinstance(x, Tensor) else x for x in this)
    ends = weights[4:]
    expected = (*memory_step.stepped(exact), *memory_step.gradients(exact, *(x.double() for x in ends)))
    mine, again = ((*memory_step.forward(*this), *memory_step.backward(*this, *ends)) for _ in range(2))
    for given, twice, theirs in zip(mine, again, expected, strict=True):
        assert torch.equal(given, twice)
        assert relative(given, theirs) <= {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
