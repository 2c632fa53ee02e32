"""The references against independent forms, in float64."""

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.rotary import rotary_table, rotate
from nlscale_kernels.summed_loss import reference, summed_loss
from nlscale_kernels.swiglu import swiglu


def test_rotation_is_a_complex_product() -> None:
    x = torch.randn(7, 2, 3, 8, dtype=torch.float64)
    cosine, sine = (part.double() for part in rotary_table(7, 8, 10_000.0))
    frequency = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(7, 4, dtype=torch.float64), torch.outer(torch.arange(7.0).double(), frequency))
    expected = torch.complex(*x.chunk(2, -1)) * turn[:, None, None]
    torch.testing.assert_close(
        rotate(x, cosine, sine), torch.cat([expected.real, expected.imag], -1), rtol=1e-6, atol=1e-6
    )


def test_scores_depend_on_distance_alone() -> None:
    cosine, sine = rotary_table(32, 16, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 32, 1, 1, 16)
    scores = torch.einsum("tbhk,sbhk->ts", rotate(q, cosine, sine), rotate(k, cosine, sine))
    torch.testing.assert_close(
        scores.diagonal(3), scores[3, 0].mul(0).add(scores[0, 3]).expand(29), rtol=1e-4, atol=1e-4
    )


def test_swiglu() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(swiglu(x), x[:, :3] * torch.sigmoid(x[:, :3]) * x[:, 3:])
    assert torch.autograd.gradcheck(swiglu, (x,))


@pytest.mark.parametrize("chunk", [11, 40, 10**6])
def test_summed_loss_by_chunks_equals_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LOGITS", chunk)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    targets[3] = -1

    def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=-1)

    total = summed_loss(x, weight, targets, losses)
    expected = F.cross_entropy(x @ weight.t(), targets, reduction="sum", ignore_index=-1)
    torch.testing.assert_close(total, expected)
    actual = torch.autograd.grad(3 * total, (x, weight))
    for a, b in zip(actual, torch.autograd.grad(3 * expected, (x, weight)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(x, weight, targets, losses), expected)
