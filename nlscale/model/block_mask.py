"""Attention inside documents or a window, on a GPU: torch's flex attention, which leaves out blocks that nobody sees.

With a dense mask torch computes every score, by a slower kernel. B rows, T tokens, n = T / BLOCK blocks of a row.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from nlscale_kernels.switch import fused
from torch import Tensor

from nlscale.config.mixers import BLOCK  # queries, and keys, of a block

if TYPE_CHECKING:  # whose module takes torch's compiler, which a run on a CPU starts without
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = (
    "Tensor | BlockMask | None"  # (B or 1, 1, queries, keys), true where attention is allowed; None: causal
)


def takes(table: Tensor, past: int) -> bool:
    """Whether rows go by blocks, by their table of positions (T, ...): 16-bit numbers on a GPU, whole blocks of tokens, no
    earlier part of the row; not where kernels are switched off.
    """
    whole = table.shape[0] % BLOCK == 0 and past == 0
    return table.is_cuda and table.element_size() == 2 and whole and fused()


def block_mask(tokens: int, starts_BT: Tensor | None, window: int | None, device: torch.device) -> "BlockMask":
    """Which tokens of whole rows attend to which: to earlier ones of their document, `window` of them at most (None: all).

    `starts` None: rows are one document each. From the ends of blocks, so that nothing as large as the scores is made; for
    other rows nothing is compiled anew.
    """
    from torch.nn.attention.flex_attention import BlockMask

    document_BT = None if starts_BT is None else starts_BT.cumsum(1, dtype=torch.int32)
    place = torch.arange(tokens // BLOCK, device=device)
    apart = BLOCK * (place[:, None] - place)  # tokens between a query and a key at the same place of their blocks
    some, whole = apart >= 0, apart > 0
    if window is not None:
        some, whole = some & (apart - BLOCK + 1 < window), whole & (apart + BLOCK - 1 < window)
    some_Bnn, whole_Bnn = some[None], whole[None]
    if document_BT is not None:
        first, last = document_BT[:, ::BLOCK], document_BT[:, BLOCK - 1 :: BLOCK]
        some_Bnn = some & (last[:, None, :] >= first[:, :, None])
        whole_Bnn = whole & (first[:, None, :] == last[:, :, None])

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = key <= query if window is None else (key <= query) & (key > query - window)
        return near if document_BT is None else near & (document_BT[row, query] == document_BT[row, key])

    return BlockMask.from_kv_blocks(
        *listed(some_Bnn & ~whole_Bnn),
        *listed(whole_Bnn),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(tokens, tokens),
    )


def listed(blocks_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block of queries has, (B, 1, n), and which, those first, (B, 1, n, n)."""
    order = blocks_Bnn.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_Bnn.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def dense(mask: Mask) -> Tensor | None:
    """The same as a tensor of bools, for who knows no blocks."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    from torch.nn.attention.flex_attention import create_mask

    rows, _, queries, keys = mask.shape
    return create_mask(mask.mask_mod, rows, None, queries, keys, mask.kv_indices.device)


@cache
def compiled() -> Callable[..., Any]:
    """Flex attention as kernels for the shapes that it meets."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def by_blocks(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: "BlockMask") -> Tensor:
    """Softmax attention (B, H, T, K), once differentiable."""
    from torch.nn.attention.flex_attention import flex_attention

    product: Any = flex_attention if torch.compiler.is_compiling() else compiled()
    found: Tensor = product(q_BHTK, k_BGTK, v_BGTK, block_mask=mask, enable_gqa=q_BHTK.shape[1] != k_BGTK.shape[1])
    return found
