"""Titans' memory as context (MAC; 2501.00663; spec 2.9).

Two places differ from the paper's text so that no token hears of a later one: a segment's tokens attend to what the memory
recalled for themselves and tokens before, and the memory's answer to a segment comes from before the segment was written.
Memory and attention work head by head, so tensor and context parallelism need no collective inside.

B rows, H heads of this rank, T tokens, C tokens of a segment, K head width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.recompute import recomputed
from nlscale_kernels.runs import after, cut
from nlscale_kernels.span import span_of
from nlscale_kernels.titans import Memory, Tokens, begin, look, step
from nlscale_kernels.unit import unit
from torch import Tensor, nn

from nlscale.config.model import Model
from nlscale.model.attention import Persistent, attend, flash, turned
from nlscale.model.exchange import Exchange
from nlscale.model.heads import HeadMixer, exact
from nlscale.model.row_state import spread
from nlscale.model.scene import Rotary, Scene
from nlscale.model.titans import Gains, gates_of, initial, net_of, written
from nlscale.runtime.leaf import Leaf

INSIDE = ("context_k", "context_v", "write_k", "write_v", "read_q")  # matrices of a head, K x K


class Segment(NamedTuple):
    """What tokens bring: (B, H, C, K), gates (B, H, C), starts (B, C) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    recall: Tensor
    rate: Tensor
    log_momentum: Tensor
    log_keep: Tensor
    starts: Tensor | None


class Left(NamedTuple):
    """What the mixer hands on: its memory, and the tokens of a segment that is not whole yet."""

    memory: Memory
    pending: Segment | None = None


class TitansContext(HeadMixer):
    """MAC: tokens of a segment attend to learned tokens, to what the memory recalls for them, and to their segment.

    What attention gives is written into the memory, and the memory's answer to it gates it.
    What was recalled for a token stands at that token's position in the segment.
    """

    def __init__(self, model: Model, config: TransformerConfig, exchange: Exchange) -> None:
        parts = dict.fromkeys(("q", "k", "v", "recall"), model.head_width) | {"rate": 1, "momentum": 1, "keep": 1}
        super().__init__(model, config, exchange, parts)
        self.settings = model.titans
        self.up, self.down = initial(self, model.titans)
        self.inside = nn.ParameterDict({name: self.made(self.held * self.width, self.width) for name in INSIDE})
        count = model.titans.persistent
        self.persistent = Persistent(self.held, count, self.width, config) if count else None
        self.gains, self.product = Gains(self), flash

    def forward(self, x_TBD: Tensor, scene: Scene, before: Left | None = None) -> tuple[Tensor, Left | None]:
        """(T, B, D) -> (T, B, D), and the memory after the last whole segment."""
        heads, _ = self.project(x_TBD, scene, None)
        rate, momentum, keep = written(self, *gates_of(self, heads))
        q, k, v, recall = (heads[name] for name in ("q", "k", "v", "recall"))
        new = Segment(q, k, v, unit(recall), rate, momentum, keep, scene.starts_BT)
        tokens, start, chunk = after(before and before.pending, new), self.start, self.settings.chunk
        inside = {name: exact(self.exchange.mine(w)).unflatten(0, (self.heads, -1)) for name, w in self.inside.items()}
        memory, pending, outputs = before.memory if before else begin(start), None, []
        for first in range(0, tokens.rate.shape[2], chunk):
            part = cut(tokens, first, first + chunk)
            size = part.rate.shape[2]
            places = scene.table[0][:size], scene.table[1][:size]  # in the segment, wherever it lies
            given = part, memory, start, inside, places
            if size < chunk:
                (o, _), pending = self.hear(*given), part
            elif self.settings.recompute and torch.is_grad_enabled():
                o, memory = recomputed(self.segment, *given)
            else:
                o, memory = self.segment(*given)
            outputs.append(o)
        left = Left(memory, pending) if scene.hand_on else None
        o = torch.cat(outputs, 2)[:, :, -new.rate.shape[2] :]
        return self.finish(o, x_TBD, {}), left

    @property
    def start(self) -> Net:
        """The memory's initial state, of this rank's heads."""
        return net_of(self.exchange, self.up, self.down, self.held)

    def begin(self, rows: int) -> Left:
        """What a row begins with."""
        return Left(spread(begin(self.start), rows))

    def segment(
        self, part: Segment, memory: Memory, start: Net, inside: dict[str, Tensor], places: Rotary
    ) -> tuple[Tensor, Memory]:
        """One segment: recall, attend, ask, write."""
        o, lesson = self.hear(part, memory, start, inside, places)
        span = span_of(lesson.log_keep, lesson.starts)
        return o, step(memory, start, lesson, span, self.settings.activation)

    def hear(
        self, part: Segment, memory: Memory, start: Net, inside: dict[str, Tensor], places: Rotary
    ) -> tuple[Tensor, Tokens]:
        """What a segment's tokens hear (B, H, C, K), and what is to be written of them."""
        own = torch.ones(part.q.shape[2], part.q.shape[2], dtype=torch.bool, device=part.q.device).tril()
        fresh_BC = None
        if part.starts is not None:
            document_BC = part.starts.cumsum(1)
            fresh_BC = document_BC > 0
            own = own & (document_BC[:, :, None] == document_BC[:, None])[:, None]
        recalled = look(fresh_BC, start, memory.net, part.recall, self.settings.activation)
        q, k = (turned(each, places) for each in (part.q, part.k))
        k = torch.cat([turned(recalled @ inside["context_k"].mT, places), k], 2)
        v = torch.cat([recalled @ inside["context_v"].mT, part.v], 2)
        y = attend(q, k, v, torch.cat([own, own], -1), self.persistent, self.exchange, self.product)
        asked = unit(y @ inside["read_q"].mT)
        answer = look(fresh_BC, start, memory.net, asked, self.settings.activation)
        keys, values = written(self, unit(y @ inside["write_k"].mT), y @ inside["write_v"].mT)
        gates = part.rate, part.log_momentum, part.log_keep
        return self.gains(y, answer, self.exchange), Tokens(asked, keys, values, *gates, part.starts)

    def leaves(self) -> Iterator[Leaf]:
        """Projections, the memory's initial state, the matrices inside, attention's learned tokens, gains."""
        yield from super().leaves()
        yield Leaf("memory.main.up", self.up, shard=0)
        yield Leaf("memory.main.down", self.down, shard=0)
        for name, weight in self.inside.items():
            yield Leaf(f"memory.{name}", weight, shard=0)
        if self.persistent is not None:
            yield from self.persistent.leaves()
        yield from self.gains.leaves()
