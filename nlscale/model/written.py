"""Attention whose output passes a weight that the row itself writes: AdaTransformer (eq. 69; spec 1, row 9).

    o_t = W_t y_t,    W_t = W_{t-1} + rate_t v_t k_t^T    (rule delta: W_{t-1} k_t is erased first),

y what attention says, k and v its own keys (before positions turn them, of length one) and values; W_0, a slow weight that
decays like any matrix, begins as the identity. At rate 0 the block is a Transformer's with one more matrix a head; with
W_0 = 0 it is linear attention on y. Heads are split over ranks, and a write costs no collective.

B rows, H heads of this rank, T tokens, K head width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.linear_memory import Tokens, linear_memory
from nlscale_kernels.unit import unit
from torch import Tensor

from nlscale.config.model import Model
from nlscale.model.attention import Context, attend, flash, handed_on, seen_so_far, turned
from nlscale.model.exchange import Exchange
from nlscale.model.heads import HeadMixer, by_token, exact
from nlscale.model.scene import Scene
from nlscale.runtime.leaf import Leaf


class Left(NamedTuple):
    """What the mixer hands on: its weight (B, H, K, K), and what attention remembers of the row."""

    state: Tensor
    context: Context | None = None


class WrittenMixer(HeadMixer):
    """x + out(W_t attention(norm(x))), W_t written token by token."""

    attends = True

    def __init__(self, model: Model, config: TransformerConfig, exchange: Exchange) -> None:
        parts = dict.fromkeys(("q", "k", "v"), model.head_width) | {"rate": 1}
        super().__init__(model, config, exchange, parts)
        self.settings, self.product = model.written, flash
        self.slow = self.made(self.held * self.width, self.width)

    @property
    def start(self) -> Tensor:
        """W_0 of this rank's heads, (H, K, K)."""
        return exact(self.exchange.mine(self.slow)).unflatten(0, (self.heads, self.width))

    def forward(self, x_TBD: Tensor, scene: Scene, before: Left | None = None) -> tuple[Tensor, Left | None]:
        """(T, B, D) -> (T, B, D), and the weight after the last token."""
        heads, _ = self.project(x_TBD, scene, None)
        q, k, v = (heads[name].to(x_TBD.dtype) for name in ("q", "k", "v"))
        q, k = turned(q, scene.rotary), turned(k, scene.rotary)
        seen, settings = seen_so_far(before and before.context, k, v), self.settings
        y = exact(attend(q, *seen, scene.mask, None, self.exchange, self.product))
        rate = settings.rate * self.gate(heads, "rate").sigmoid()
        tokens = Tokens(y, unit(heads["k"]), heads["v"], rate, torch.zeros_like(rate), scene.starts_BT)
        o, state = linear_memory(settings.rule, tokens, settings.chunk, self.start, before and before.state)
        update, _ = self.out(self.exchange.to_tokens(by_token(o.to(x_TBD.dtype))))
        return x_TBD + update, Left(state, handed_on(seen, scene)) if scene.hand_on else None

    def begin(self, rows: int) -> Left:
        """What a row begins with."""
        return Left(self.start.expand(rows, *self.start.shape))

    def leaves(self) -> Iterator[Leaf]:
        """The base's, and W_0."""
        yield from super().leaves()
        yield Leaf("memory.slow", self.slow, shard=0)
