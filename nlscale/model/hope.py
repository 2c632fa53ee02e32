"""HOPE-Attention: embed; each block attends, then passes its continuum; norm; head (spec 2.8).

A model is one pipeline stage's share of the network; on one stage it is the whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.rotary import rotary_table
from torch import Tensor, nn

from nlscale.config.model import Model
from nlscale.model.attention import Attention, document_mask
from nlscale.model.continuum import VARIANTS, ContinuumSubmodules
from nlscale.model.loss import Head
from nlscale.runtime.leaf import Leaf, prefixed

MASKS = {"document": document_mask, "causal": lambda starts_BT: None}


@dataclass(frozen=True)
class Stage:
    """The part of the network that one model holds."""

    layers: range
    first: bool = True  # embeds tokens
    last: bool = True  # computes the loss
    chunk: int | None = None  # which of a rank's chunks, where stages are interleaved


class Block(MegatronModule):
    """One layer: attention, then the continuum, each with its own norm and residual."""

    def __init__(self, model: Model, units: Mapping[str, int], config: TransformerConfig) -> None:
        super().__init__(config)
        self.mix = Attention(model, config, ColumnParallelLinear, RowParallelLinear)
        self.continuum = VARIANTS[model.variant](units, model.activation, config, ContinuumSubmodules(), model.gains)

    def forward(self, x_TBD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(T, B, D) -> (T, B, D)."""
        return self.continuum(self.mix(x_TBD, rotary, mask))

    def leaves(self) -> Iterator[Leaf]:
        """The leaves of both halves."""
        yield from prefixed("mix", self.mix.leaves())
        yield from prefixed("continuum", self.continuum.leaves())


class Hope(MegatronModule):
    """One stage of the network, in the form that megatron-core's schedules call."""

    def __init__(
        self, model: Model, units: Mapping[str, int], tokens: int, config: TransformerConfig, stage: Stage
    ) -> None:
        """`units`: level -> feed-forward units; `tokens`: T of a row; `model.vocabulary` must be set."""
        super().__init__(config)
        assert model.vocabulary is not None
        self.stage, self.vp_stage = stage, stage.chunk
        self.model_type = ModelType.encoder_or_decoder
        self.tied = model.tied
        self.input: Tensor | None = None
        self.mask = MASKS[model.attention]
        if stage.first:
            self.embed = VocabParallelEmbedding(
                model.vocabulary,
                model.width,
                init_method=config.init_method,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
            )
        self.blocks = nn.ModuleList([Block(model, units, config) for _ in stage.layers])
        if stage.last:
            own = self.embed.weight if model.tied and stage.first else None
            self.head = Head(model.vocabulary, config, own)
        device = None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        for name, table in zip(
            ("cosine", "sine"), rotary_table(tokens, model.head_width, model.rope_base, device), strict=True
        ):
            self.register_buffer(name, table.to(config.params_dtype), persistent=False)

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
        x_TBD: Any = self.enter(tokens_BT) if self.stage.first else self.input
        mask, rotary = self.mask(starts_BT), (self.cosine, self.sine)
        for block in self.blocks:
            x_TBD = block(x_TBD, rotary, mask)
        return self.head(x_TBD, targets_BT) if self.stage.last else x_TBD

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
