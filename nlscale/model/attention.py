"""Attention: the non-parametric memory of a block (spec 1, row 8), with rotary positions and grouped queries.

T tokens, B rows, D width, H query heads, G key and value heads, K head width; H and G are this rank's.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.rotary import rotate
from torch import Tensor

from nlscale.config.model import Model
from nlscale.model.layers import Norm
from nlscale.runtime.leaf import Leaf


class Attention(MegatronModule):
    """x + out(softmax attention(norm(x))): one fused projection for q, k and v, split over ranks by heads."""

    def __init__(self, model: Model, config: TransformerConfig, column: type, row: type) -> None:
        super().__init__(config)
        width = model.head_width
        ranks = config.tensor_model_parallel_size
        self.heads, self.groups = model.heads // ranks, model.key_value_heads // ranks
        self.norm = Norm(model.width, config)
        options = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
        projections = width * (model.heads + 2 * model.key_value_heads)
        self.qkv = build_module(column, model.width, projections, gather_output=False, **options)
        self.out = build_module(
            row, model.heads * width, model.width, input_is_parallel=True, is_expert=False, **options
        )

    def forward(self, x_TBD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(T, B, D) -> (T, B, D); `mask` is (B, 1, T, T), true where attention is allowed, or None: causal."""
        fused, _ = self.qkv(self.norm(x_TBD))
        heads_TBHK = fused.unflatten(-1, (self.heads + 2 * self.groups, -1))
        qk, v = heads_TBHK.split([self.heads + self.groups, self.groups], dim=2)
        q, k = rotate(qk, *rotary).split([self.heads, self.groups], dim=2)
        q_BHTK, k_BGTK, v_BGTK = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        o_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, is_causal=mask is None, enable_gqa=self.groups != self.heads
        )
        update, _ = self.out(o_BHTK.permute(2, 0, 1, 3).flatten(2))
        return x_TBD + update

    def leaves(self) -> Iterator[Leaf]:
        """norm, q, k, v, out."""
        yield from self.norm.leaves()
        unit, start = self.qkv.weight.shape[0] // (self.heads + 2 * self.groups), 0
        for name, count in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
            rows = {"start": start, "length": count * unit}
            yield Leaf(f"{name}.weight", self.qkv.weight, **rows, shard=0, linear=self.qkv, scattered=self.norm.partial)
            start += count * unit
        yield Leaf("out.weight", self.out.weight, shard=1, linear=self.out)


def document_mask(starts_BT: Tensor) -> Tensor:
    """(B, 1, T, T): token t may look at s <= t of its own document; `starts` is true at a document's first token."""
    document_BT = starts_BT.cumsum(1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()[:, None]
