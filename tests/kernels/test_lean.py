"""The memories' written-out gradients against autograd's of the reference, in float64."""

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.mlp_memory import Net, gathered, lean, read, reference
from nlscale_kernels.mlp_memory.bounded import bounded
from nlscale_kernels.unit import unit
from torch import Tensor

B, H, C, K, M = 2, 3, 6, 4, 5


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize(("count", "out"), [(2, K), (2, 1), (1, K)])
def test_gradients_are_the_references(rows: int, count: int, out: int, activation: str) -> None:
    inner = 2 * M if activation == "swiglu" else M
    net = Net(numbers(rows, H, count, inner, K), numbers(rows, H, count, out, M))
    key, arrives = numbers(B, H, C, K), numbers(B, H, C, 3)
    weights = [numbers(B, H, C), numbers(B, H, C) + 1]
    for target in (numbers(B, H, count, C, out), numbers(B, H, 1, C, out)):
        given = [*net, key, target, arrives, *weights]
        results = []
        for form in (lean, reference):
            first, second = form.gathered(net, key, target, arrives, weights, activation)
            said = form.read(net, key, activation)
            outputs = [first, *second, said]
            total = sum((each * numbers(*each.shape).detach()).sum() for each in outputs)
            results.append(outputs + list(torch.autograd.grad(total, given)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_what_the_package_offers_are_the_lean_forms() -> None:
    assert read is lean.read and gathered is lean.gathered


@pytest.mark.parametrize("limit", [0.0, 1.5, 100.0])
@pytest.mark.parametrize("two", [False, True])
def test_bounded_is_its_formula(limit: float, two: bool) -> None:
    change, beside = numbers(B, H, M, K), numbers(B, H, M, K + 1)
    given = (change, beside) if two else (change,)
    norm = change.square().sum((-2, -1), keepdim=True).sqrt()
    share = torch.minimum(torch.ones(()), limit / norm) if limit else torch.ones_like(norm)
    assert limit != 1.5 or int((share < 1).sum()) > 0
    ours, theirs = [each for each in bounded(limit, *given) if each is not None], [each * share for each in given]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    weights = [numbers(*each.shape).detach() + 1 for each in theirs]
    slopes = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(form, weights, strict=True)), given, retain_graph=True)
        for form in (ours, theirs)
    ]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_unit_is_torchs_normalize_and_rms_norm() -> None:
    x, of = numbers(5, 3, 8), numbers(5, 3, 8).detach()
    for ours, theirs in (
        (unit(x), F.normalize(x, dim=-1)),
        (unit(x, 8**0.5, 8e-5), F.rms_norm(x, (8,), eps=1e-5)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        a, b = (torch.autograd.grad((each * of).sum(), x)[0] for each in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert torch.autograd.gradgradcheck(unit, (x,))
    assert unit(torch.zeros(2, 4)).abs().sum() == 0
