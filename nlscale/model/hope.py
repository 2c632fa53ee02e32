"""HOPE: embed; each block mixes tokens (attention or a memory), then passes its continuum; norm; head (spec 2.7, 2.8).

A model is one pipeline stage's share of the network; on one stage it is the whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.model import Model
from nlscale.model.attention import Persistent
from nlscale.model.continuum import VARIANTS, ContinuumSubmodules
from nlscale.model.exchange import Exchange
from nlscale.model.loss import Head
from nlscale.model.mixers import MIXERS
from nlscale.model.rope import rotary_of
from nlscale.model.row_state import RowState, between_rows, check
from nlscale.model.scene import Scene, scene
from nlscale.runtime.leaf import Leaf, prefixed


@dataclass(frozen=True)
class Stage:
    """The part of the network that one model holds."""

    layers: range
    first: bool = True  # embeds tokens
    last: bool = True  # computes the loss
    chunk: int | None = None  # which of a rank's chunks, where stages are interleaved


class Block(MegatronModule):
    """One layer: a mixer of tokens, then the continuum, each with its own norm and residual."""

    def __init__(self, model: Model, units: Mapping[str, int], config: TransformerConfig, exchange: Exchange) -> None:
        super().__init__(config)
        self.mix = MIXERS[model.mixer](model, config, exchange)
        self.continuum = VARIANTS[model.variant](units, model.activation, config, ContinuumSubmodules(), model.gains)

    def forward(self, x_TBD: Tensor, scene: Scene, before: Any = None) -> tuple[Tensor, Any]:
        """(T, B, D) -> (T, B, D), and what the mixer hands on to the row's next tokens (`before` in that call)."""
        x_TBD, left = self.mix(x_TBD, scene, before)
        return self.continuum(x_TBD), left

    def leaves(self) -> Iterator[Leaf]:
        """The leaves of both halves."""
        yield from prefixed("mix", self.mix.leaves())
        yield from prefixed("continuum", self.continuum.leaves())


class Hope(MegatronModule):
    """One stage of the network, in the form that megatron-core's schedules call."""

    def __init__(
        self,
        model: Model,
        units: Mapping[str, int],
        tokens: int,
        config: TransformerConfig,
        stage: Stage,
        exchange: Exchange | None = None,
    ) -> None:
        """`units`: level -> feed-forward units; `tokens`: T of a row; `model.vocabulary` must be set; `exchange`: the
        ranks that share a row.
        """
        super().__init__(config)
        assert model.vocabulary is not None
        self.stage, self.vp_stage = stage, stage.chunk
        self.model_type = ModelType.encoder_or_decoder
        self.tied, self.mixer = model.tied, model.mixer
        self.input: Tensor | None = None
        self.exchange, self.window, self.loops = exchange or Exchange(), model.window, model.loops
        self.apart = model.attention == "document"
        if stage.first:
            self.embed = VocabParallelEmbedding(
                model.vocabulary,
                model.width,
                init_method=config.init_method,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
            )
        blocks = [self.kind_of(layer, model)(model, units, config, self.around(layer, model)) for layer in stage.layers]
        self.blocks = nn.ModuleList(blocks)
        self.attends = any(block.mix.attends for block in blocks)
        self.by_blocks = not any(isinstance(part, Persistent) for part in self.blocks.modules())  # seen beside the row
        if stage.last:
            own = self.embed.weight if model.tied and stage.first else None
            self.head = Head(model.vocabulary, config, own)
        device = None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        for name, table in zip(("cosine", "sine"), rotary_of(model, tokens, device), strict=True):
            self.register_buffer(name, table.to(config.params_dtype), persistent=False)

    def around(self, layer: int, model: Model) -> Exchange:
        """The ranks that share a layer's rows."""
        return self.exchange

    def kind_of(self, layer: int, model: Model) -> type[Block]:
        """The class of a layer."""
        return Block

    @property
    def entrance(self) -> list[nn.Module]:
        """The embedding, where this stage has it."""
        return [self.embed] if self.stage.first else []

    @property
    def exit(self) -> list[nn.Module]:
        """The head, where this stage has it."""
        return [self.head] if self.stage.last else []

    def set_input_tensor(self, tensors: Tensor | Sequence[Tensor | None] | None) -> None:
        """Takes what the previous stage sent; megatron-core's schedules call this before forward."""
        self.input = tensors[0] if isinstance(tensors, list | tuple) else tensors  # type: ignore[assignment]

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor) -> Tensor:
        """On the last stage the summed loss (scalar), elsewhere the activations (T, B, D) for the next stage."""
        return self.onward((tokens_BT, targets_BT, starts_BT))[0]

    def onward(
        self, batch: tuple[Tensor, Tensor, Tensor], before: RowState | None = None, hand_on: bool = False
    ) -> tuple[Tensor, RowState]:
        """As forward, for rows that go on where others ended; with `hand_on` also what these leave to the next.

        Raises ValueError where `before` is another model's.
        """
        tokens_BT, targets_BT, starts_BT = batch
        x_TBD: Any = self.enter(self.exchange.tokens(tokens_BT, 1)) if self.stage.first else self.input
        if before is not None:
            check(before, self.begin(tokens_BT.shape[0]), "state")
        x_TBD, left = self.walk(x_TBD, self.scene(starts_BT, hand_on=hand_on), before and before.mixers)
        output = self.head(x_TBD, self.own(targets_BT)) if self.stage.last else x_TBD
        return output, RowState(self.mixer, [between_rows(each) for each in left], [])

    def own(self, batch: Tensor) -> Tensor:
        """The part of targets (B, T) whose losses this rank sums."""
        return self.exchange.tokens(batch, 1)

    def begin(self, rows: int) -> RowState:
        """What rows begin with that go on from no others."""
        mixers = [block.mix.begin(rows) for _ in range(self.loops) for block in self.blocks]  # type: ignore[union-attr,operator]
        return RowState(self.mixer, mixers, [])

    def scene(self, starts_BT: Tensor, past: int = 0, hand_on: bool = False) -> Scene:
        """The scene of the tokens after the first `past` of a row; `starts` of all of its tokens so far."""
        rotary = self.cosine[: starts_BT.shape[1]], self.sine[: starts_BT.shape[1]]
        starts = starts_BT if self.apart else None
        return scene(rotary, starts, self.window, past, hand_on, self.attends, self.by_blocks)

    def walk(self, x_TBD: Tensor, scene: Scene, before: Sequence[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """All blocks of this stage, `model.loops` times over; what each hands on, in the order in which they were passed."""
        left: list[Any] = []
        came = iter(before or [None] * (self.loops * len(self.blocks)))
        for _ in range(self.loops):
            for block in self.blocks:
                x_TBD, state = block(x_TBD, scene, next(came))
                left.append(state)
        return x_TBD, left

    def enter(self, tokens_BT: Tensor) -> Tensor:
        """Embeddings (T, B, D); with sequence parallelism this rank's part of T."""
        x = self.embed(tokens_BT)
        return x if self.config.sequence_parallel else x.transpose(0, 1).contiguous()

    def leaves(self) -> Iterator[Leaf]:
        """Every learnable tensor of this stage under its global name."""
        if self.stage.first:
            yield Leaf("embed.weight", self.embed.weight, shard=0, tied=self.tied and not self.stage.last)
        for layer, block in zip(self.stage.layers, self.blocks, strict=True):
            yield from prefixed(f"blocks.{layer}", block.leaves())  # type: ignore[operator]
        if self.stage.last:
            yield from self.head.norm.leaves()
            if not self.tied:
                yield Leaf("head.weight", self.head.weight, shard=0)
            elif not self.stage.first:
                yield Leaf("embed.weight", self.head.weight, shard=0, tied=True, twin=True)
