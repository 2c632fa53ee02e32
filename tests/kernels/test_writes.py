"""Writes of chunks in a row as those of one: the same states, each chunk turned once. float64."""

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.self_modifying.writes import Erased, Writes, joined, writes_of
from nlscale_kernels.span import filtered, span_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

B, H, C, N, K = 4, 2, 4, 5, 8
STARTS = torch.zeros(B, N * C, dtype=torch.bool)
STARTS[1, 9] = STARTS[2, [0, 6, 17]] = STARTS[3, [4, 8, 19]] = (
    True  # in a chunk, several of them, at chunks' first tokens
)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


LOG_MOMENTUM = F.logsigmoid(numbers(B, H, N * C))


def made(starts: Tensor | None, momentum: bool, count: int = N) -> list[Writes]:
    k = F.normalize(numbers(B, H, count * C, K), dim=-1)
    rate, keep = torch.sigmoid(numbers(B, H, count * C)), F.logsigmoid(numbers(B, H, count * C + 1)[..., 1:])
    parts = []
    for n in range(count):
        own = slice(n * C, (n + 1) * C)
        begun = None if starts is None else starts[:, own]
        parts.append(
            writes_of(k[:, :, own], rate[..., own], keep[..., own], LOG_MOMENTUM[..., own] if momentum else None, begun)
        )
    return parts


def after(writes: Writes, states: list[Tensor], first: list[Tensor], w: Tensor) -> list[Tensor]:
    """W2, W1 and W1's momentum (each (B, H, K, K)) after a run of tokens that write w (B, H, T, K)."""
    up, down, speed = states
    if writes.renewed_B is not None:
        mark = writes.renewed_B[:, None, None, None]
        up, down = torch.where(mark, first[0], up), torch.where(mark, first[1], down)
    s = writes.scalars
    whole, carry, left = (each[..., None, None] for each in (s.whole_BH, s.carry_BH, s.left_BH))
    learnt = [(share.unsqueeze(-1) * w).mT @ w for share in (s.write_BHC, s.hold_BHC)]
    return [
        up @ writes.turn + w.mT @ writes.reach,
        whole * down + carry * speed + learnt[0],
        left * speed + learnt[1],
    ]


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "plain"])
@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
def test_chunks_in_a_row_are_one(starts: Tensor | None, momentum: bool) -> None:
    parts, w = made(starts, momentum), numbers(B, H, N * C, K)
    first = [numbers(1, H, K, K), numbers(1, H, K, K + 1)[..., 1:]]
    begin = [numbers(B, H, K, K), numbers(B, H, K, K).flip(0), numbers(B, H, K, K).flip(1) * momentum]
    states = begin
    for part, own in zip(parts, w.split(C, 2), strict=True):
        states = after(part, states, first, own)
    for mine, right in zip(after(joined(parts), begin, first, w), states, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-12)
    assert joined(parts[:1]) is parts[0]


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
def test_mean_momentum_is_that_of_the_last_documents_tokens(starts: Tensor | None) -> None:
    mean = joined(made(starts, True)).momentum
    begun = torch.zeros_like(STARTS) if starts is None else starts
    document = begun.cumsum(-1)
    for b in range(B):
        last = LOG_MOMENTUM[b, :, document[b] == document[b, -1]].exp().mean(-1)
        torch.testing.assert_close(mean[b], last, rtol=1e-12, atol=0)  # type: ignore[index]
    fresh = joined(made(starts, True)).fresh_BC
    assert (fresh is None) if starts is None else torch.equal(fresh, document > 0)  # type: ignore[arg-type]


def test_joining_takes_one_product_a_chunk() -> None:
    """Not one a pair of chunks: what was written early is turned by the product of all later turns, once."""

    def operations(count: int) -> int:
        parts = made(None, True, N)
        parts = (parts * count)[:count]
        with FlopCounterMode(display=False) as counter:
            joined(parts)
        return counter.get_total_flops()

    assert operations(17) == 16 * operations(2)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
def test_what_is_made_anew_in_backward_has_autograds_gradients(starts: Tensor | None) -> None:
    keep = F.logsigmoid(numbers(B, H, N * C)).requires_grad_()

    def scalars(log_keep: Tensor, log_momentum: Tensor) -> list[Tensor]:
        found = filtered(span_of(log_keep, starts), log_momentum)
        return [found.write_BHC, found.hold_BHC, found.carry_BH, found.left_BH]

    leaves = keep, LOG_MOMENTUM.clone().requires_grad_()
    assert torch.autograd.gradcheck(scalars, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(scalars, leaves, fast_mode=True)
    erased = [numbers(B, H, C, K), numbers(B, H, C, 1), numbers(B, H, C, K).flip(2)]
    torch.testing.assert_close(
        Erased.apply(*erased), torch.einsum("bhck,bhc,bhca->bhka", erased[0], erased[1][..., 0], erased[2])
    )
    leaves = [x.requires_grad_() for x in erased]
    assert torch.autograd.gradcheck(Erased.apply, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(Erased.apply, leaves, fast_mode=True)
