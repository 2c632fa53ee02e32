"""Attention: the non-parametric memory of a block (spec 1, row 8), with rotary positions and grouped queries.

T tokens, B rows, D width, H query heads, G key and value heads, K head width, P tokens of earlier parts of the row; H and G
are this rank's.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.rotary import rotate, rotate_both
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nlscale.config.model import Model
from nlscale.model.block_mask import Mask, by_blocks, dense
from nlscale.model.exchange import Exchange
from nlscale.model.layers import Norm
from nlscale.model.scene import Rotary, Scene
from nlscale.runtime.leaf import Leaf


class Context(NamedTuple):
    """What attention remembers of the tokens before: keys (rotated) and values, (B, G, P, K) each."""

    k: Tensor
    v: Tensor


def seen_so_far(before: Context | None, k_BGTK: Tensor, v_BGTK: Tensor) -> Context:
    """Keys and values of the row's tokens up to these."""
    if before is None:
        return Context(k_BGTK, v_BGTK)
    return Context(torch.cat([before.k, k_BGTK], 2), torch.cat([before.v, v_BGTK], 2))


def handed_on(seen: Context, scene: Scene) -> Context | None:
    """What the row's next tokens may attend to; None where nobody asks."""
    if not scene.hand_on or scene.window is None:
        return seen if scene.hand_on else None
    first = max(0, seen.k.shape[2] + 1 - scene.window)
    return Context(seen.k[:, :, first:], seen.v[:, :, first:])


def turned(part_BHTK: Tensor, rotary: Rotary) -> Tensor:
    """Rotary positions on (B, H, T, K)."""
    cosine, sine = (table[:, 0, 0] for table in rotary)
    return rotate(part_BHTK, cosine, sine)


class Attention(MegatronModule):
    """x + out(softmax attention(norm(x))): one fused projection for q, k and v, split over ranks by heads."""

    attends = True  # asks for the scene's mask

    def __init__(
        self,
        model: Model,
        config: TransformerConfig,
        exchange: Exchange,
        groups: int | None = None,
        persistent: int = 0,
    ) -> None:
        """`groups`: key and value heads, None: the model's; `persistent`: learned tokens that every token sees."""
        super().__init__(config)
        width, ranks = model.head_width, config.tensor_model_parallel_size
        groups = groups or model.key_value_heads
        self.exchange, self.width, self.turned, self.product = exchange, width, rotate_both, flash
        self.held = {"q": model.heads // ranks, "k": groups // ranks, "v": groups // ranks}
        self.norm = Norm(model.width, config)
        options = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
        projections = width * (model.heads + 2 * groups)
        self.qkv = build_module(ColumnParallelLinear, model.width, projections, gather_output=False, **options)
        self.out = build_module(
            RowParallelLinear, model.heads * width, model.width, input_is_parallel=True, is_expert=False, **options
        )
        self.persistent = Persistent(self.held["k"], persistent, width, config) if persistent else None

    def forward(self, x_TBD: Tensor, scene: Scene, context: Context | None = None) -> tuple[Tensor, Context | None]:
        """(T, B, D) -> (T, B, D), and what the row's next tokens may attend to."""
        fused, _ = self.qkv(self.norm(x_TBD))
        pieces = self.exchange.to_heads(fused.split([n * self.width for n in self.held.values()], -1))
        q, k, v = (piece.unflatten(-1, (-1, self.width)) for piece in pieces)
        q, k = self.turned(q, k, *scene.rotary)
        q_BHTK, k_BGTK, v_BGTK = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        seen = seen_so_far(context, k_BGTK, v_BGTK)
        o_BHTK = attend(q_BHTK, *seen, scene.mask, self.persistent, self.exchange, self.product)
        update, _ = self.out(self.exchange.to_tokens(o_BHTK.permute(2, 0, 1, 3).flatten(2)))
        return x_TBD + update, handed_on(seen, scene)

    def begin(self, rows: int) -> None:
        """What a row begins with: attention sees its own row alone."""

    def leaves(self) -> Iterator[Leaf]:
        """norm, q, k, v, out."""
        yield from self.norm.leaves()
        start = 0
        for name, count in self.held.items():
            rows = {"start": start, "length": count * self.width}
            yield Leaf(f"{name}.weight", self.qkv.weight, **rows, shard=0, linear=self.qkv, scattered=self.norm.partial)
            start += count * self.width
        if self.persistent is not None:
            yield from self.persistent.leaves()
        yield Leaf("out.weight", self.out.weight, shard=1, linear=self.out)


class Persistent(nn.Module):
    """Learned keys and values that every token sees, whatever its document (Titans' persistent memory, by heads)."""

    def __init__(self, heads: int, count: int, width: int, config: TransformerConfig) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.count, self.heads = count, heads
        for name in ("k", "v"):
            shape = heads * count, width
            self.register_parameter(name, nn.Parameter(torch.empty(*shape, dtype=config.params_dtype, device=device)))

    def before(self, name: str, part_BHTK: Tensor, exchange: Exchange) -> Tensor:
        """The learned tokens, then the row's: (B, H, count + T, K)."""
        learned = exchange.mine(self.get_parameter(name)).to(part_BHTK.dtype).unflatten(0, (-1, self.count))
        return torch.cat([learned.expand(part_BHTK.shape[0], *learned.shape), part_BHTK], 2)

    def leaves(self) -> Iterator[Leaf]:
        """Keys and values."""
        yield Leaf("persistent.k", self.get_parameter("k"), shard=0)
        yield Leaf("persistent.v", self.get_parameter("v"), shard=0)


Product = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


def flash(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Mask) -> Tensor:
    """Softmax attention by torch's fastest kernel, once differentiable; `mask` None: causal."""
    if mask is not None and not isinstance(mask, Tensor):
        return by_blocks(q_BHTK, k_BGTK, v_BGTK, mask)
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGTK,
        v_BGTK,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BHTK.shape[1] != k_BGTK.shape[1],
    )


def by_math(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Mask) -> Tensor:
    """The same with all weights held, differentiable as often as one likes."""
    with sdpa_kernel(SDPBackend.MATH):
        return flash(q_BHTK, k_BGTK, v_BGTK, dense(mask))


def attend(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    mask: Mask,
    persistent: Persistent | None,
    exchange: Exchange,
    product: Product,
) -> Tensor:
    """Softmax attention (B, H, T, K); `mask` None: causal over as many keys as queries."""
    if persistent is not None:
        k_BGTK, v_BGTK = persistent.before("k", k_BGTK, exchange), persistent.before("v", v_BGTK, exchange)
        mask = dense(mask)
        if mask is None:
            mask = torch.ones(q_BHTK.shape[2], q_BHTK.shape[2], dtype=torch.bool, device=q_BHTK.device).tril()
        mask = F.pad(mask, (persistent.count, 0), value=True)
    return product(q_BHTK, k_BGTK, v_BGTK, mask)
