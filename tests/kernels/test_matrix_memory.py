"""matrix_memory: gradients written out against autograd's, the kernels, interpreted, against both; every rule serially."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.linear_memory import RULES, Tokens, linear_memory, op, reference, serial
from nlscale_kernels.linear_memory import triton as forward
from nlscale_kernels.linear_memory import triton_backward as backward
from nlscale_kernels.linear_memory.memory import prepared
from nlscale_kernels.linear_memory.reference import Given, Gradients
from nlscale_kernels.triton_build import Config
from torch import Tensor

B, H = 2, 2
TINY = Config({"V": 16}, warps=4, stages=1)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokens(count: int = 24, width: int = 5, values: int = 6, documents: bool = True) -> Tokens:
    starts = torch.zeros(B, count, dtype=torch.bool)
    starts[0, [0, 3, count // 2 + 1]] = starts[1, [count // 2 - 1, count // 2, count - 1]] = True
    q, k = (numbers(B, H, count, width, seed=seed) for seed in (1, 2))
    rate, keep = torch.sigmoid(numbers(B, H, count, seed=3)), F.logsigmoid(numbers(B, H, count, seed=4) + 1)
    v = numbers(B, H, count, values, seed=5)
    return Tokens(q, F.normalize(k, dim=-1), v, rate, keep, starts if documents else None)


def given(rule: str, chunk: int, **kinds: Any) -> Given:
    each = tokens(**kinds)
    shape = (H, each.v.shape[-1], each.k.shape[-1])
    return prepared(rule, each, chunk, numbers(*shape, seed=6), numbers(B, *shape, seed=7)).given


def to(given: Given, dtype: torch.dtype) -> Given:
    """Keys, values, queries in a dtype, the rest in float32."""
    narrow = [x.to(dtype) for x in given[:3]]
    return Given(*narrow, *(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given[3:]))


def wide(given: Given) -> Given:
    return Given(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given))


def ends(given: Given) -> tuple[Tensor, Tensor]:
    return numbers(*given.v.shape, seed=8), numbers(*given.state.shape, seed=9)


def by_autograd(given: Given, d_o: Tensor, d_last: Tensor) -> list[Tensor]:
    given = Given(
        *(x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)
    )
    leaves = [getattr(given, name) for name in Gradients._fields]
    found = torch.autograd.grad(reference.matrix_memory(given), leaves, [d_o, d_last], allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for d, x in zip(found, leaves, strict=True)]


def near(mine: Tensor, expected: Tensor, relative: float) -> bool:
    return float((mine.double() - expected).norm()) <= relative * float(expected.norm()) + 1e-12


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "documents"])
@pytest.mark.parametrize("chunk", [1, 6, 24])
@pytest.mark.parametrize("rule", RULES)
def test_rules_by_chunks_are_the_recurrence(rule: str, chunk: int, documents: bool) -> None:
    each, initial, state = tokens(documents=documents), numbers(H, 6, 5, seed=6), numbers(B, H, 6, 5, seed=7)
    o, last = linear_memory(rule, each, chunk, initial, state)
    expected, left = serial(rule, each, initial, state, chunk)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(last, left, rtol=1e-10, atol=1e-12)


def test_dgd_is_the_delta_rule_of_twice_the_rate_and_half_the_value() -> None:
    """The identity by which a kernel of the gated delta rule serves Delta Gradient Descent on |M k - v|^2 / 2."""
    each, initial = tokens(), numbers(H, 6, 5)
    twice = each._replace(rate=2 * each.rate, v=each.v / 2)
    for mine, theirs in zip(
        linear_memory("dgd", each, 6, initial), linear_memory("delta", twice, 6, initial), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "documents"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_written_out_are_autograds(rule: str, documents: bool) -> None:
    this = given(rule, 6, documents=documents)
    mine = reference.gradients(this, *ends(this))
    for name, d, expected in zip(mine._fields, mine, by_autograd(this, *ends(this)), strict=True):
        torch.testing.assert_close(d, expected, rtol=1e-9, atol=1e-11, msg=lambda said, name=name: f"{name}: {said}")


SHAPES = [(24, 6, 5, 6), (33, 33, 16, 20), (40, 20, 19, 35), (120, 60, 8, 8)]  # tokens, chunk, width, values


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "documents"])
@pytest.mark.parametrize("rule", ["delta", "linear", "delta_frozen"])
def test_kernels(rule: str, documents: bool, shape: tuple[int, int, int, int]) -> None:
    """Every tensor that comes out, at shapes that no tile divides."""
    count, chunk, width, values = shape
    this = given(rule, chunk, count=count, width=width, values=values, documents=documents)
    assert not wrong(this, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["dgd_frozen", "linear"])
def test_kernels_of_narrow_numbers(rule: str, dtype: torch.dtype) -> None:
    this = given(rule, 24, count=48, width=16, values=16)
    assert not wrong(this._replace(scalars=scalars_of(this)), dtype)


def scalars_of(this: Given) -> Tensor:
    """Rates below a half: in narrow numbers the erasures of larger ones lose what they should keep."""
    scalars = this.scalars.clone()
    scalars[:3] *= 0.5
    return scalars


def wrong(this: Given, dtype: torch.dtype) -> list[str]:
    """What comes out of the kernels and is not near the reference in float64."""
    this = to(this, dtype)
    d_o, d_last = ends(this)
    d_o = d_o.to(dtype)
    asked = wide(this)
    mine = (*forward.matrix_memory(this, (TINY,) * 3), *backward.gradients(this, d_o, d_last.float(), (TINY,) * 5))
    expected = (*reference.matrix_memory(asked), *reference.gradients(asked, d_o.double(), d_last))
    plain = (*reference.matrix_memory(this), *reference.gradients(this, d_o, d_last.float()))  # what a switch would run
    forms = zip(("o", "last", *Gradients._fields), mine, plain, expected, strict=True)
    limit = TOLERANCE[dtype]
    return [name for name, *both, theirs in forms if not all(near(x, theirs, limit) for x in both)]


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_inverse_of_matrices_that_powers_would_not_survive(size: int) -> None:
    """All keys alike and full rates: A is all ones, its powers grow to 1e37, its inverse 1 and -1."""
    keys = torch.ones(1, 1, size, 1)
    one, zero = torch.ones(1, 1, size), torch.zeros(1, 1, size)
    found = forward.inverses_of(keys, one, zero, zero, None, 1)[0, 0, 0]
    expected = torch.eye(size) - torch.eye(size).roll(1, 0).tril(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_operator_is_well_formed_and_twice_differentiable() -> None:
    this = given("delta", 3, count=6, width=2, values=3)
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in this]
    torch.library.opcheck(op.forward, tuple(leaves))
    torch.library.opcheck(op.backward, (*(x.detach() if isinstance(x, Tensor) else x for x in leaves), *ends(this)))
    assert torch.autograd.gradcheck(op.forward, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(op.forward, leaves, fast_mode=True)


def test_what_a_gpu_runs_is_the_operator() -> None:
    """The function that CUDA tensors go to, in the interpreter: checks and kernels, forward and backward."""
    this = to(given("delta", 8, count=16), torch.float32)
    d_o, d_last = (x.float() for x in ends(this))
    expected = (*reference.matrix_memory(wide(this)), *reference.gradients(wide(this), d_o.double(), d_last.double()))
    mine = (*op.forward._backend_fns["cuda"](*this), *op.backward._backend_fns["cuda"](*this, d_o, d_last))
    assert all(near(given_, theirs, 1e-5) for given_, theirs in zip(mine, expected, strict=True))


def test_compiles_whole() -> None:
    each, initial = tokens(), numbers(H, 6, 5)

    def run(q: Tensor) -> tuple[Tensor, Tensor]:
        return linear_memory("delta", each._replace(q=q), 6, initial)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    q = each.q.clone().requires_grad_()
    for mine, theirs in zip(compiled(q), run(q), strict=True):
        torch.testing.assert_close(mine, theirs)
    (mine,), (theirs,) = (torch.autograd.grad(f(q)[0].square().sum(), q) for f in (compiled, run))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": numbers(B, H, 24, 4)}, "must be \\(B, H, T, K\\)"),
        ({"v": numbers(B, H, 24, 6).float()}, "v is torch.float32"),
        ({"scalars": numbers(6, B, H, 24)}, "scalars has shape"),
        ({"ends": numbers(2, B, H, 5)}, "5 chunks, which must divide the 24 tokens"),
        ({"state": numbers(B, H, 5, 6)}, "state has shape"),
        ({"initial": numbers(H, 6, 5).float()}, "initial is torch.float32"),
        ({"document": torch.zeros(B, 24)}, "document is torch.float32"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        op.forward(*given("delta", 6)._replace(**change))


@pytest.mark.parametrize(("kinds", "words"), [({"width": 130}, "key width of 130"), ({"count": 65}, "chunk of 65")])
def test_sizes_without_a_kernel_are_named(kinds: dict[str, int], words: str) -> None:
    this = to(given("linear", kinds.get("count", 24), **kinds), torch.float32)
    with pytest.raises(ValueError, match=words):
        op.forward._backend_fns["cuda"](*this)
