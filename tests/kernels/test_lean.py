"""The memories' written-out gradients against autograd's of the reference, in float64."""

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.mlp_memory import Net, gathered, lean, read, reference, self_taught
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


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize(("count", "out"), [(2, K), (2, 1), (1, K)])
@pytest.mark.parametrize("kinds", [1, 2])
def test_a_memory_that_answers_itself_is_taught_its_own_answers(
    rows: int, count: int, out: int, activation: str, kinds: int
) -> None:
    inner = 2 * M if activation == "swiglu" else M
    net = Net(numbers(rows, H, count, inner, K), numbers(rows, H, count, out, M))
    key, value, reach = numbers(B, H, C, K), numbers(B, H, C, K), numbers(B, H, C, 3)
    share, weights = numbers(B, H, C), [numbers(B, H, C), numbers(B, H, C) + 1][:kinds]
    value = value.detach().flip(2).requires_grad_()
    given, results = [*net, key, value, reach, share, *weights[:1]], []
    for form in (lean, reference):
        first, second = form.self_taught(net, key, value, reach, share, weights, activation)
        outputs = [first, *second]
        total = sum((each * numbers(*each.shape).detach()).sum() for each in outputs)
        results.append(outputs + list(torch.autograd.grad(total, given)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_the_package_offers_are_the_lean_forms() -> None:
    assert read is lean.read and gathered is lean.gathered and self_taught is lean.self_taught


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


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize(("count", "out"), [(2, K), (2, 1)])
def test_gradients_can_be_differentiated_in_turn(count: int, out: int, activation: str) -> None:
    inner = 2 * M if activation == "swiglu" else M
    up, down = numbers(1, H, count, inner, K), numbers(1, H, count, out, M)
    key, value, arrives, weight = (
        numbers(B, H, C, K),
        numbers(B, H, C, K + 1)[..., 1:],
        numbers(B, H, C, 3),
        numbers(B, H, C),
    )
    target = numbers(B, H, 1, C, out)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        up, down, key, value, target, arrives, weight = given
        net = Net(up, down)
        first, second = gathered(net, key, target, arrives, [weight, weight + 1], activation)
        mine, own = self_taught(net, key, value, arrives, weight, [weight], activation)
        return read(net, key, activation), first, *second, mine, *own

    given = up, down, key, value.detach().requires_grad_(), target, arrives, weight
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)
