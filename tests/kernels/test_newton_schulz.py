"""newton_schulz: both forms are the polynomial of the singular values; the kernel, interpreted, is the product."""

from typing import Any

import pytest
import torch
from nlscale_kernels.newton_schulz import QUINTIC, op, orthogonal, reference, triton
from nlscale_kernels.newton_schulz.reference import by_gram, direct, multiplications
from torch import Tensor


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def scaled(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = numbers(*shape)
    return (x / x.norm(dim=(-2, -1), keepdim=True)).to(dtype)


def by_singular_values(x: Tensor, iterations: int) -> Tensor:
    """The iteration as it acts on singular values."""
    a, b, c = QUINTIC
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    for _ in range(iterations):
        values = a * values + b * values**3 + c * values**5
    return left * values.unsqueeze(-2) @ right


@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("form", [direct, by_gram])
def test_both_forms_are_the_polynomial(form: Any, iterations: int) -> None:
    x = scaled(3, 12, 40)
    torch.testing.assert_close(form(x, iterations), by_singular_values(x, iterations), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 12, 40), (2, 40, 12), (1, 300, 1300), (1, 1300, 300)])
def test_orthogonal_takes_either_way_round(shape: tuple[int, int, int]) -> None:
    x = scaled(*shape, dtype=torch.float32)
    rows, columns = sorted(shape[1:])
    straight, gram = multiplications(rows, columns, 5)
    assert gram < straight  # but below 256 rows the direct form is taken all the same
    torch.testing.assert_close(orthogonal(x, 5), by_singular_values(x.double(), 5).float(), rtol=1e-3, atol=2e-4)


def test_counts_are_those_of_the_products() -> None:
    """Every product counted as it is made: a symmetric one costs half."""
    counts = []
    for form in (direct, by_gram):
        made = [0]

        def product(
            x: Tensor, y: Tensor, add: Tensor | None = None, *, made: list[int] = made, **kinds: float
        ) -> Tensor:
            made[0] += x.shape[1] ** 2 * x.shape[2] // 2
            return reference.symmetric_product(x, y, add, **kinds)

        form(scaled(1, 16, 64), 5, product)
        wide = (
            16 * 16 * 64
        )  # the products that are not symmetric: five times the polynomial, or twice what came together
        counts.append(made[0] + wide * (5 if form is direct else 2))
    assert tuple(counts) == multiplications(16, 64, 5)


@pytest.mark.parametrize("iterations", [5, 7, 10, 12])
def test_by_gram_stays_near_where_the_rank_is_low(iterations: int) -> None:
    x = numbers(1, 100, 20) @ numbers(1, 20, 400)
    x = x / x.norm()
    expected = by_singular_values(x, iterations)
    gram, straight = (
        float((form(x.float(), iterations) - expected).norm() / expected.norm()) for form in (by_gram, direct)
    )
    assert gram <= 1e-3 + 2 * straight < 0.2  # rounding where x is zero grows 3.4 times an iteration, in either form


@pytest.mark.parametrize("form", [direct, by_gram])
def test_half_precision_ends_near_orthogonal(form: Any) -> None:
    narrow = torch.float16 if form is by_gram else torch.bfloat16
    values = torch.linalg.svdvals(form(scaled(1, 64, 256, dtype=narrow), 5).float())
    assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 33, 50), (1, 70, 31), (1, 64, 64), (1, 1, 40)])
@pytest.mark.parametrize("turned", [False, True])
def test_kernel(shape: tuple[int, int, int], dtype: torch.dtype, turned: bool) -> None:
    x = numbers(*shape, dtype=dtype)
    x = x.mT.contiguous().mT if turned else x
    weights = numbers(*shape[:2], shape[1], dtype=dtype)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for add, alpha, beta in ((None, 1.0, 0.0), (weights + weights.mT, 0.3, -0.7)):
        expected = reference.symmetric_product(
            x.double(), x.double(), None if add is None else add.double(), alpha, beta
        )
        given = triton.symmetric_product(x, x, add, alpha, beta)
        assert (given.double() - expected).norm() <= tolerance * expected.norm()
        mirrored, tile = given - given.mT, triton.SMALL.options()["TILE"]
        tiles = torch.arange(shape[1]) // tile
        assert not mirrored[:, tiles[:, None] != tiles].any()  # stored twice; within a tile the machine's BLAS decides


def test_kernel_of_two_matrices_that_commute() -> None:
    a = numbers(1, 40, 40, dtype=torch.float32)
    a = (a + a.mT) / 9
    expected = a.double() @ a.double() @ a.double()
    given = triton.symmetric_product(a, reference.symmetric_product(a, a))
    assert (given.double() - expected).norm() <= 2e-6 * expected.norm()


def test_operator_is_well_formed_and_twice_differentiable() -> None:
    x, y, add = (numbers(2, 3, 4), numbers(2, 3, 4) + 1, numbers(2, 3, 3))
    given = tuple(each.requires_grad_() for each in (x, y, add))
    torch.library.opcheck(op.symmetric_product, (*given, 0.5, 2.0))
    function = lambda x, y, add: op.symmetric_product(x, y, add, 0.5, 2.0)
    assert torch.autograd.gradcheck(function, given) and torch.autograd.gradgradcheck(function, given)


def test_compiles_whole() -> None:
    x = scaled(2, 12, 40, dtype=torch.float32)
    compiled = torch.compile(orthogonal, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 5), orthogonal(x, 5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_KNM": numbers(3, 4)}, "takes K matrices"),
        ({"y_KNM": numbers(1, 3, 5)}, "y is"),
        ({"add_KNN": numbers(1, 3, 4)}, r"add is .* \(1, 3, 4\) on cpu; it must be contiguous"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"x_KNM": numbers(1, 3, 4), "y_KNM": numbers(1, 3, 4)}
    with pytest.raises(ValueError, match=words):
        op.symmetric_product(**(given | change))


def test_what_a_gpu_has_no_kernel_for_is_named_or_the_references() -> None:
    on_gpu = op.symmetric_product._backend_fns["cuda"]
    x = numbers(1, 3, 4)
    torch.testing.assert_close(on_gpu(x, x), x @ x.mT)
    with pytest.raises(ValueError, match="no kernel for torch.float32; torch.bfloat16 or torch.float16 would do"):
        on_gpu(x.float(), x.float())
