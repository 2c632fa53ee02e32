"""Titans as mixers: the memory alone, as gate and as layer beside attention (2501.00663; spec 2.9).

Memory and attention work head by head, so tensor and context parallelism need no collective inside. The memory as context
is in titans_context.py.

B rows, H heads of this rank, T tokens, K head width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.titans import Memory, Tokens, begin, titans
from nlscale_kernels.unit import unit
from torch import Tensor, nn

from nlscale.config.mixers import Titans
from nlscale.config.model import Model
from nlscale.config.shapes import units_of
from nlscale.model.attention import Attention, Context, Persistent, attend, flash, handed_on, seen_so_far, turned
from nlscale.model.exchange import Exchange
from nlscale.model.heads import HeadMixer, Heads, exact, stacked
from nlscale.model.row_state import spread
from nlscale.model.scene import Scene
from nlscale.runtime.leaf import Leaf, prefixed


class Left(NamedTuple):
    """What a Titans mixer hands on."""

    memory: Memory
    tail: Heads | None = None  # of the convolution
    context: Context | None = None  # of attention


class TitansMixer(HeadMixer):
    """LMM: x + out(M(q)) with a small network a head that is written as it is read."""

    attention: tuple[str, ...] = ()  # further projections
    gated = True

    def __init__(self, model: Model, config: TransformerConfig, exchange: Exchange) -> None:
        parts = dict.fromkeys(("q", "k", "v", *self.attention), model.head_width)
        parts |= {"rate": 1, "momentum": 1, "keep": 1} | ({"gate": model.head_width} if self.gated else {})
        local = ("gate",) if self.gated else ()
        super().__init__(model, config, exchange, parts, model.titans.convolution, ("q", "k", "v"), local)
        self.settings = model.titans
        self.up, self.down = initial(self, model.titans)

    @property
    def start(self) -> Net:
        """The memory's initial state, of this rank's heads."""
        return net_of(self.exchange, self.up, self.down, self.held)

    def tokens(self, heads: Heads, scene: Scene) -> Tokens:
        """What the memory is written with."""
        k, v, rate, momentum, keep = written(self, unit(heads["k"]), heads["v"], *gates_of(self, heads))
        return Tokens(unit(heads["q"]), k, v, rate, momentum, keep, scene.starts_BT)

    def forward(self, x_TBD: Tensor, scene: Scene, before: Left | None = None) -> tuple[Tensor, Left | None]:
        """(T, B, D) -> (T, B, D), and the memory after the last token."""
        heads, tail = self.project(x_TBD, scene, before and before.tail)
        o, memory = titans(
            self.tokens(heads, scene),
            self.settings.chunk,
            self.start,
            before and before.memory,
            self.settings.recompute,
            self.settings.activation,
        )
        return self.finish(o, x_TBD, heads), Left(memory, tail) if scene.hand_on else None

    def begin(self, rows: int) -> Left:
        """What a row begins with."""
        return Left(spread(begin(self.start), rows), self.no_tail(rows))

    def leaves(self) -> Iterator[Leaf]:
        """The base's, and the memory's initial state."""
        yield from super().leaves()
        yield Leaf("memory.main.up", self.up, shard=0)
        yield Leaf("memory.main.down", self.down, shard=0)


def initial(mixer: HeadMixer, settings: Titans) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters of one memory a head: (H I, K) and (H K, M)."""
    inward, units = units_of(settings, mixer.width)
    return mixer.made(mixer.held * inward, mixer.width), mixer.made(mixer.held * mixer.width, units)


def net_of(exchange: Exchange, up: Tensor, down: Tensor, held: int) -> Net:
    """One memory a head of this rank, for all rows."""
    heads = held // exchange.ranks
    return Net(stacked([exchange.mine(up)], heads), stacked([exchange.mine(down)], heads))


def gates_of(mixer: HeadMixer, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Inner rate, log of momentum and log of the share kept, (B, H, T) each."""
    rate = mixer.settings.rate * mixer.gate(heads, "rate").sigmoid()  # type: ignore[union-attr,operator]
    largest: float = mixer.settings.rate  # type: ignore[union-attr,assignment]
    return rate, mixer.momentum(heads, largest), mixer.keep(heads, largest)


def written(mixer: HeadMixer, *parts: Tensor) -> tuple[Tensor, ...]:
    """Of what tokens write: as it is, or without a gradient to what makes it (Titans' ablation; spec 1, row 14)."""
    return parts if mixer.settings.taught else tuple(part.detach() for part in parts)  # type: ignore[union-attr]


class Gains(nn.Module):
    """Two streams of heads, each normed with a learned gain, one gating the other (Titans 4.2: o = y x M(y))."""

    def __init__(self, mixer: HeadMixer) -> None:
        super().__init__()
        self.attention, self.memory = (mixer.made(mixer.held, mixer.width) for _ in range(2))
        self.eps = mixer.config.layernorm_epsilon

    def forward(self, attended_BHTK: Tensor, recalled_BHTK: Tensor, exchange: Exchange) -> Tensor:
        """(B, H, T, K)."""
        normed = [
            F.rms_norm(stream, stream.shape[-1:], eps=self.eps) * exact(exchange.mine(gain))[:, None]
            for stream, gain in ((attended_BHTK, self.attention), (recalled_BHTK, self.memory))
        ]
        return normed[0] * F.silu(normed[1])

    def leaves(self) -> Iterator[Leaf]:
        """Both gains."""
        yield Leaf("gain.attention", self.attention, shard=0)
        yield Leaf("gain.memory", self.memory, shard=0)


class TitansGate(TitansMixer):
    """MAG: attention (over a window, `model.window`) and the memory read the same tokens; one gates the other."""

    attention = ("attention_q", "attention_k", "attention_v")
    gated = False
    attends = True

    def __init__(self, model: Model, config: TransformerConfig, exchange: Exchange) -> None:
        super().__init__(model, config, exchange)
        count = model.titans.persistent
        self.persistent = Persistent(self.held, count, self.width, config) if count else None
        self.gains, self.product = Gains(self), flash

    def forward(self, x_TBD: Tensor, scene: Scene, before: Left | None = None) -> tuple[Tensor, Left | None]:
        """(T, B, D) -> (T, B, D), and what attention and memory hand on."""
        heads, tail = self.project(x_TBD, scene, before and before.tail)
        memory = before and before.memory
        settings = self.settings
        given = settings.chunk, self.start, memory, settings.recompute, settings.activation
        recalled, memory = titans(self.tokens(heads, scene), *given)
        q, k, v = (heads[name] for name in self.attention)
        q, k = (turned(part, scene.rotary) for part in (q, k))
        seen = seen_so_far(before and before.context, k, v)
        attended = attend(q, *seen, scene.mask, self.persistent, self.exchange, self.product)
        o = self.gains(attended, recalled, self.exchange)
        left = Left(memory, tail, handed_on(seen, scene)) if scene.hand_on else None
        return self.finish(o, x_TBD, {}), left

    def leaves(self) -> Iterator[Leaf]:
        """The memory's, attention's learned tokens, gains."""
        yield from super().leaves()
        if self.persistent is not None:
            yield from self.persistent.leaves()
        yield from self.gains.leaves()


class TitansLayer(MegatronModule):
    """MAL: the memory, then attention (over a window) on what it gives, each with its own norm and residual."""

    attends = True

    def __init__(self, model: Model, config: TransformerConfig, exchange: Exchange) -> None:
        super().__init__(config)
        self.recall = TitansMixer(model, config, exchange)
        self.attend = Attention(model, config, exchange, model.heads, model.titans.persistent)

    def forward(self, x_TBD: Tensor, scene: Scene, before: Left | None = None) -> tuple[Tensor, Left | None]:
        """(T, B, D) -> (T, B, D), and what both hand on."""
        x_TBD, left = self.recall(x_TBD, scene, before)
        x_TBD, context = self.attend(x_TBD, scene, before and before.context)
        return x_TBD, left and left._replace(context=context)

    def begin(self, rows: int) -> Left:
        """What a row begins with."""
        return self.recall.begin(rows)

    def leaves(self) -> Iterator[Leaf]:
        """Both halves."""
        yield from prefixed("recall", self.recall.leaves())
        yield from prefixed("attend", self.attend.leaves())
