"""The adapter to flash-linear-attention: its published rule, in its layout, gives what ours gives."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.linear_memory import Tokens, fla, linear_memory
from torch import Tensor

from nlscale.config.errors import UserError
from nlscale.config.mixers import Linear
from nlscale.config.model import Model
from nlscale.model.linear import memory_of

B, H, T, K, V = 2, 3, 12, 4, 5


def published(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """S <- e^g S, S <- S + b k (v - S^T k)^T, o = scale S^T q: the gated delta rule (Yang et al., 2024), (B, T, H, .)."""
    assert output_final_state
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state
        missed = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], missed)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokens(starts: Tensor | None = None) -> Tokens:
    q, k, v = numbers(B, H, T, K), F.normalize(numbers(B, H, T, K, seed=1), dim=-1), numbers(B, H, T, V, seed=2)
    rate, keep = torch.sigmoid(numbers(B, H, T, seed=3)), F.logsigmoid(numbers(B, H, T, seed=4))
    return Tokens(q, k, v, rate, keep, starts)


def refuses(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
    raise AssertionError("called")


@pytest.mark.parametrize("state", [None, numbers(B, H, V, K, seed=5)], ids=["from-the-start", "handed-on"])
@pytest.mark.parametrize("rule", fla.VALUES)
def test_its_rule_is_ours(rule: str, state: Tensor | None) -> None:
    initial = numbers(H, V, K, seed=6)
    mine, theirs = (
        fla.by_fla(rule, tokens(), 4, initial, state, published),
        linear_memory(rule, tokens(), 4, initial, state),
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_documents_are_ours() -> None:
    starts = numbers(B, T) > 1
    mine, theirs = (
        fla.by_fla("delta", tokens(starts), 4, numbers(H, V, K), None, refuses),
        linear_memory("delta", tokens(starts), 4, numbers(H, V, K)),
    )
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_what_it_cannot_do_is_named() -> None:
    with pytest.raises(ValueError, match="fla has no rule linear; it has delta, dgd"):
        fla.by_fla("linear", tokens(), 4, numbers(H, V, K))
    with pytest.raises(UserError, match="needs model.mixer=delta, not linear"):
        Model(mixer="linear", linear=Linear(kernels="fla"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs an NVIDIA GPU; own would work"):
            memory_of(Model(mixer="delta", linear=Linear(kernels="fla")))
