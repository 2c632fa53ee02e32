"""Attention in rows of documents: by blocks of a mask, against torch's kernels for a dense mask and for none."""

from collections.abc import Callable

import torch
from torch import Tensor

from nlscale.bench.memory_kernels import Shape
from nlscale.bench.table import Row, Timer, at_least
from nlscale.model.attention import flash
from nlscale.model.block_mask import BLOCK, Mask, block_mask, dense

DOCUMENTS = 8  # of a row


def attention(shape: Shape, device: str, timer: Timer) -> list[Row]:
    """Forward and backward, bfloat16 on a GPU; `shape`: rows, heads, tokens, head width."""
    rows, heads, tokens, width = shape
    tokens = max(tokens, BLOCK)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v, of = (torch.randn(rows, heads, tokens, width, device=device).to(dtype) for _ in range(4))
    given = [x.requires_grad_() for x in (q, k, v)]

    def mask(documents: int) -> Mask:
        starts = torch.arange(tokens, device=device) % (tokens // documents) == 0
        return block_mask(tokens, starts.expand(rows, tokens), None, torch.device(device))

    def form(mask: Mask) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(flash(q, k, v, mask), given, of)

    one, several = mask(1), mask(DOCUMENTS)
    by_blocks, apart, masked, causal = timer([form(each) for each in (one, several, dense(one), None)])
    return [
        at_least("attention in documents, dense mask / blocks, with backward", masked, "s", by_blocks, 2.0),
        at_least("attention in documents, causal flash / blocks, with backward", causal, "s", by_blocks, 0.7),
        at_least(f"attention in documents, one / {DOCUMENTS} of a row, with backward", by_blocks, "s", apart, 3.0),
    ]
