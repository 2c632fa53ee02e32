"""Attention by blocks on one GPU: against float64, the same bits twice, inside a compiled function."""

import pytest
import torch
from torch import Tensor

from nlscale.model.attention import flash
from nlscale.model.block_mask import block_mask, dense, takes

pytestmark = pytest.mark.gpu
LIMIT = 1e-2  # relative norm, bfloat16
TOKENS = 1024


@pytest.fixture(autouse=True)
def _anew() -> None:
    """After eight kinds of arguments torch compiles no more, and runs the plain form."""
    torch.compiler.reset()


def heads(count: int, width: int, seed: int) -> Tensor:
    """(B, H, T, K), as a projection leaves them: tokens before heads."""
    generator = torch.Generator("cuda").manual_seed(seed)
    numbers = torch.randn(TOKENS, 2, count, width, device="cuda", generator=generator, dtype=torch.bfloat16)
    return numbers.permute(1, 2, 0, 3).requires_grad_()


def starts(share: float) -> Tensor:
    return torch.rand(2, TOKENS, device="cuda", generator=torch.Generator("cuda").manual_seed(3)) < share


def results(q: Tensor, k: Tensor, v: Tensor, mask: object, product: object = flash) -> list[Tensor]:
    """Outputs and gradients, which come back as a projection sends them: tokens before heads."""
    o = product(q, k, v, mask).permute(2, 0, 1, 3).flatten(2)  # type: ignore[operator]
    to = torch.randn(o.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(4)).to(o.dtype)
    return [o, *torch.autograd.grad(o, (q, k, v), to)]


@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("window", [None, 300])
def test_outputs_and_gradients(window: int | None, groups: int, width: int) -> None:
    q, k, v = heads(8, width, 0), heads(groups, width, 1), heads(groups, width, 2)
    assert takes(torch.empty(TOKENS, 1, 1, width, dtype=torch.bfloat16, device="cuda"), 0)
    for documents in (None, starts(0.0), starts(0.01), starts(0.3)):
        mask = block_mask(TOKENS, documents, window, q.device)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        found, again = results(q, k, v, mask), results(q, k, v, mask)
        for mine, right, twice in zip(found, results(*exact, dense(mask)), again, strict=True):
            assert float((mine.double() - right).norm() / right.norm()) <= LIMIT
            assert torch.equal(mine, twice)


def test_in_a_compiled_function() -> None:
    q, k, v = heads(8, 64, 0), heads(2, 64, 1), heads(2, 64, 2)
    compiled = torch.compile(lambda *given: flash(*given) + 0, fullgraph=True)
    for share in (0.0, 0.02):
        mask = block_mask(TOKENS, starts(share), None, q.device)
        for mine, right in zip(results(q, k, v, mask, compiled), results(q, k, v, mask), strict=True):
            assert float((mine - right).norm() / right.norm()) <= LIMIT
