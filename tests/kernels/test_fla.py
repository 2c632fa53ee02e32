"""The adapter to flash-linear-attention: its published rule, and its kernels, interpreted, give what ours gives."""

import builtins
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.linear_memory import Tokens, fla, linear_memory
from torch import Tensor

from nlscale.config.errors import UserError
from nlscale.config.mixers import Linear
from nlscale.config.model import Model
from nlscale.config.read import read
from nlscale.model.linear import memory_of

B, H, T, K, V = 2, 3, 12, 4, 5
LEARNT = 1e-4  # relative, float32: spec I14


class Count(int):
    """A loop's counter as Triton compiles it; the interpreter counts with plain ones."""

    def to(self, _: Any) -> int:
        return int(self)


def counted(*given: Any) -> Iterator[Count]:
    return map(Count, builtins.range(*map(int, given)))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """fla's chunked kernels, interpreted: with the first of the configs that it would try, as there is nothing to time."""
    pytest.importorskip("fla")
    chunks = import_module("fla.ops.common.chunk_delta_h")
    autotuner = import_module("triton.runtime.autotuner").Autotuner
    monkeypatch.setattr(chunks, "range", counted, raising=False)
    monkeypatch.setattr(autotuner, "_bench", lambda *_, **__: [1.0, 1.0, 1.0])
    return fla.kernel_of()


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


def tokens(starts: Tensor | None = None, length: int = T, key: int = K, value: int = V) -> Tokens:
    q, k = numbers(B, H, length, key), F.normalize(numbers(B, H, length, key, seed=1), dim=-1)
    v = numbers(B, H, length, value, seed=2)
    rate, keep = torch.sigmoid(numbers(B, H, length, seed=3)), F.logsigmoid(numbers(B, H, length, seed=4))
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


@pytest.mark.parametrize("rule", fla.VALUES)
def test_a_state_of_which_nothing_is_kept_has_an_end(rule: str) -> None:
    """Where a token keeps e^-200 of it, e / a would be infinite in float32."""
    given, initial = Tokens(*(x.float() for x in tokens()[:5]), None), numbers(H, V, K).float()
    given.log_keep[:, :, [3, 7, 8]] = torch.tensor([-60.0, -200.0, -120.0])
    theirs, mine = fla.by_fla(rule, given, 4, initial, kernel=published), linear_memory(rule, given, 4, initial)
    for a, b in zip(theirs, mine, strict=True):
        assert float((a - b).norm() / b.norm()) <= LEARNT


@pytest.mark.parametrize("rule", fla.VALUES)
def test_i14_its_kernels_are_ours(rule: str, kernel: Callable[..., Any]) -> None:
    """Outputs, the state handed on, and every gradient; the row does not end with a chunk of its (64 tokens)."""
    key, value = 16, 24
    given = [x.float().requires_grad_() for x in tokens(None, 80, key, value)[:5]]
    initial, state = (numbers(*shape, seed=5).float() for shape in ((H, value, key), (B, H, value, key)))
    leaves, mine, theirs = [*given, state.requires_grad_()], list[Tensor](), list[Tensor]()
    for found, (o, last) in (
        (theirs, fla.by_fla(rule, Tokens(*given), 16, initial, state, kernel)),
        (mine, linear_memory(rule, Tokens(*given), 16, initial, state)),
    ):
        told = (o * numbers(*o.shape, seed=7)).sum() + (last * numbers(*last.shape, seed=8)).sum()
        found += [o, last, *torch.autograd.grad(told, leaves)]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(theirs, mine, strict=True)]
    assert len(errors) == 2 + len(leaves) and max(errors) <= LEARNT, errors


def test_documents_are_ours() -> None:
    starts = numbers(B, T) > 1
    mine, theirs = (
        fla.by_fla("delta", tokens(starts), 4, numbers(H, V, K), None, refuses),
        linear_memory("delta", tokens(starts), 4, numbers(H, V, K)),
    )
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_what_it_cannot_do_is_named() -> None:
    for triton, refuses_it in (
        ("3.3.1", False),
        ("3.4.0", True),
        ("3.6.0", True),
        ("3.7.0+git1", True),
        ("3.7.1", False),
    ):
        assert bool(fla.refused(triton, (9, 0))) == refuses_it and not fla.refused(triton, (10, 0))
    with pytest.raises(
        UserError, match="model.linear.kernels=fla with train.kernels=reference would run other kernels"
    ):
        read("demo-delta", ["model.linear.kernels=fla", "train.kernels=reference"])
    with pytest.raises(ValueError, match="fla has no rule linear; it has delta, dgd"):
        fla.by_fla("linear", tokens(), 4, numbers(H, V, K))
    with pytest.raises(UserError, match="needs model.mixer=delta, not linear"):
        Model(mixer="linear", linear=Linear(kernels="fla"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs an NVIDIA GPU; own would work"):
            memory_of(Model(mixer="delta", linear=Linear(kernels="fla")))
