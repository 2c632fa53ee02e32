"""The continuum memory system in place of a feed-forward block (Behrouz et al., 2025, eqs. 70-74; spec 2.2, 2.4).

A feed-forward block holds one or several levels. Its hidden units belong to levels, slice by slice, so that forward and
backward stay one pair of matrix products and tensor parallelism keeps one collective each way; the identity
"sum of level blocks = one block of summed width" is exact (spec V13).

    independent   one FeedForward, all levels side by side:   y = x + sum_l W_l act(U_l norm(x))
    sequential    a chain of them, one level each:            x_l = x_{l-1} + W_l act(U_l norm_l(x_{l-1})), fast first
    nested        a chain too, whose fast levels start anew from their slow copies (optim/nested.py)

T tokens, B rows, D width, U hidden units of this rank.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.swiglu import swiglu
from torch import Tensor, nn

from nlscale.model.collectives import from_tensor_ranks, to_tensor_ranks
from nlscale.model.fast import Fast
from nlscale.model.layers import Down, Norm
from nlscale.runtime.leaf import Leaf, prefixed


def gelu(hidden: Tensor) -> Tensor:
    """GELU, tanh form."""
    return F.gelu(hidden, approximate="tanh")


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "gelu": (gelu, ("up",)),
    "swiglu": (swiglu, ("gate", "up")),
}


Heard = Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Trace:
    """What a level saw in a chunk; its gradient is that at `hidden` x `normed`, and `active` x that at `update`."""

    normed: Tensor  # (T, B, D)
    hidden: dict[str, Tensor]  # inward part -> (T, B, U) before the activation
    active: Tensor  # (T, B, U)
    update: Tensor  # (T, B, D)


@dataclass
class ContinuumSubmodules:
    """The parallel linear layers a continuum is built of."""

    up: type | ModuleSpec = ColumnParallelLinear
    down: type | ModuleSpec = Down


class Gains(nn.Module):
    """A weight a level on its hidden units; each rank has a part of the units, so gradients are partial sums."""

    def __init__(self, units: Sequence[int], config: TransformerConfig) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.values = nn.Parameter(torch.ones(len(units), dtype=config.params_dtype, device=device))
        self.units: Tensor
        self.register_buffer("units", torch.tensor(units, device=device), persistent=False)
        self.total = sum(units)

    def forward(self, hidden_TBU: Tensor) -> Tensor:
        """(T, B, U) -> (T, B, U)."""
        return hidden_TBU * self.values.repeat_interleave(self.units, output_size=self.total)


class FeedForward(MegatronModule):
    """x + down(act(up(norm(x)))), its hidden units cut into levels."""

    def __init__(
        self,
        units: Mapping[str, int],
        activation: str,
        config: TransformerConfig,
        submodules: ContinuumSubmodules,
        gains: bool = False,
    ) -> None:
        """`units`: level name -> hidden units over all ranks; a level with 0 units has no leaf here.

        `gains`: a learned weight a level (spec 2.4), in the order of `units`.
        """
        super().__init__(config)
        self.units = {name: count // config.tensor_model_parallel_size for name, count in units.items() if count}
        self.activation, self.inward = ACTIVATIONS[activation]
        total, width = sum(units.values()), config.hidden_size
        options = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
        self.norm = Norm(width, config)
        self.up = build_module(
            submodules.up, width, total * len(self.inward), gather_output=False, is_expert=False, **options
        )
        self.down = build_module(submodules.down, total, width, input_is_parallel=True, is_expert=False, **options)
        self.weigh = Gains(list(self.units.values()), config) if gains else nn.Identity()

    def forward(self, x_TBD: Tensor) -> Tensor:
        """(T, B, D) -> (T, B, D)."""
        hidden, _ = self.up(self.norm(x_TBD))
        update, _ = self.down(self.weigh(self.activation(hidden)))
        return x_TBD + update

    def adaptive(
        self, x_TBD: Tensor, copies: Mapping[str, Mapping[str, Fast]], heard: Heard = None
    ) -> tuple[Tensor, dict[str, Trace]]:
        """The same with what levels have learned inside the rows (level -> part -> change), and what they saw.

        `heard`: by level, the tokens that hear it (B, T, 1); None: all.
        """
        normed = self.norm(x_TBD)
        fused, _ = self.up(normed)
        counts, names = list(self.units.values()), list(self.units)
        pieces = dict(
            zip(itertools.product(self.inward, names), fused.split(counts * len(self.inward), -1), strict=True)
        )
        copied = to_tensor_ranks(normed)
        for name, parts in copies.items():
            mine = copied.transpose(0, 1) if heard is None else copied.transpose(0, 1) * heard[name]
            for part in self.inward if name in self.units else ():
                added = parts[part].inward(mine)
                whole = pieces[part, name] + (added.transpose(0, 1) if isinstance(added, Tensor) else added)
                pieces[part, name] = whole
        hidden = self.weigh(self.activation(torch.cat(list(pieces.values()), -1)))
        update, _ = self.down(hidden)
        active = dict(zip(names, hidden.split(counts, -1), strict=True))
        learned = [
            parts["down"].outward(active[name].transpose(0, 1) * (1 if heard is None else heard[name]))
            for name, parts in copies.items()
            if name in active
        ]
        said = [each for each in learned if isinstance(each, Tensor)]
        if said:
            update = update + from_tensor_ranks(sum(said[1:], said[0]).transpose(0, 1))
        traces = {
            name: Trace(copied, {part: pieces[part, name] for part in self.inward}, active[name], update)
            for name in copies
            if name in active
        }
        return x_TBD + update, traces

    def of(self, level: str) -> "FeedForward":
        """The block that holds a level's units."""
        return self

    def leaves(self) -> Iterator[Leaf]:
        """norm, then up (gate) and down of each level."""
        yield from self.norm.leaves()
        if isinstance(self.weigh, Gains):
            yield Leaf("gains", self.weigh.values, partial=self.config.tensor_model_parallel_size > 1)
        total, start = sum(self.units.values()), 0
        for name, count in self.units.items():
            for index, part in enumerate(self.inward):
                first = index * total + start
                rows = {"start": first, "length": count}
                yield Leaf(
                    f"{name}.{part}.weight",
                    self.up.weight,
                    **rows,
                    shard=0,
                    linear=self.up,
                    scattered=self.norm.partial,
                )
            yield self.down.leaf(f"{name}.down.weight", start, count)
            start += count


class Sequential(MegatronModule):
    """A chain of feed-forward blocks, one level each, fast first."""

    def __init__(
        self,
        units: Mapping[str, int],
        activation: str,
        config: TransformerConfig,
        submodules: ContinuumSubmodules,
        gains: bool = False,
    ) -> None:
        """`gains` belong to the independent variant; the config refuses them here."""
        super().__init__(config)
        chain = {name: FeedForward({name: n}, activation, config, submodules) for name, n in units.items() if n}
        self.chain = nn.ModuleDict(chain)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """(T, B, D) -> (T, B, D)."""
        for level in self.chain.values():
            x_TBD = level(x_TBD)
        return x_TBD

    @property
    def inward(self) -> tuple[str, ...]:
        """Names of the parts that read the input."""
        return next(iter(self.chain.values())).inward  # type: ignore[return-value]

    def adaptive(
        self, x_TBD: Tensor, copies: Mapping[str, Mapping[str, Fast]], heard: Heard = None
    ) -> tuple[Tensor, dict[str, Trace]]:
        """The same with what levels have learned inside the rows, and what they saw."""
        traces: dict[str, Trace] = {}
        for name, level in self.chain.items():
            own = {name: copies[name]} if name in copies else {}
            x_TBD, seen = level.adaptive(x_TBD, own, heard)  # type: ignore[operator]
            traces |= seen
        return x_TBD, traces

    def of(self, level: str) -> FeedForward:
        """The block that holds a level's units."""
        return self.chain[level]  # type: ignore[return-value]

    def leaves(self) -> Iterator[Leaf]:
        """Each level's own norm, up (gate) and down."""
        for name, level in self.chain.items():
            for leaf in level.leaves():  # type: ignore[operator]
                yield from prefixed(name, iter([leaf])) if leaf.name == "norm.weight" else iter([leaf])


VARIANTS: dict[str, type[FeedForward] | type[Sequential]] = {
    "independent": FeedForward,
    "sequential": Sequential,
    "nested": Sequential,
}


class MegatronContinuum(MegatronModule):
    """A continuum as the `mlp` of a megatron-core TransformerLayer, which adds the residual itself."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ContinuumSubmodules,
        units: Mapping[str, int],
        activation: str = "swiglu",
        variant: str = "independent",
        **_: object,
    ) -> None:
        super().__init__(config)
        self.continuum = VARIANTS[variant](units, activation, config, submodules)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """(T, B, D) -> the update (T, B, D) and no bias."""
        return self.continuum(hidden_states) - hidden_states, None


def continuum_spec(units: Mapping[str, int], activation: str = "swiglu", variant: str = "independent") -> ModuleSpec:
    """Spec for `TransformerLayerSubmodules.mlp` of any Megatron program; pair it with megatron-core's IdentityOp as
    `pre_mlp_layernorm`: a continuum norms its own input.

    `units`: level name -> hidden units, fast to slow.
    """
    return ModuleSpec(
        module=MegatronContinuum,
        submodules=ContinuumSubmodules(),
        params={"units": dict(units), "activation": activation, "variant": variant},
    )
