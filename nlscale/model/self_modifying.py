"""Self-modifying Titans as a mixer: with a continuum behind it a block of HOPE (spec 2.6, 2.7; eqs. 83-97)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.self_modifying import Gates, Memories, State, Still, Tokens, begin, self_modifying
from nlscale_kernels.unit import unit
from torch import Tensor, nn

from nlscale.config.mixers import GATES
from nlscale.config.model import Model
from nlscale.config.shapes import units_of
from nlscale.model.exchange import Exchange
from nlscale.model.heads import HeadMixer, Heads, exact, stacked
from nlscale.model.row_state import spread
from nlscale.model.scene import Scene
from nlscale.runtime.leaf import Leaf


class Left(NamedTuple):
    """What self-modifying Titans hand on."""

    state: State
    tail: Heads | None


class SelfModifyingMixer(HeadMixer):
    """x + out(SMT(norm(x))): five or six memories a head, whose initial states are parameters."""

    def __init__(self, model: Model, config: TransformerConfig, exchange: Exchange) -> None:
        settings, width = model.self_modifying, model.head_width
        parts = {"input": width} | ({} if settings.query else {"q": width})
        parts |= ({"momentum": 1} if settings.momentum else {}) | ({"gate": width} if settings.gate else {})
        local = ("gate",) if settings.gate else ()
        super().__init__(model, config, exchange, parts, settings.convolution, ("input",), local)
        self.settings, (inward, hidden) = settings, units_of(settings, width)
        shapes = dict.fromkeys((*settings.vectors, "main"), (self.held * width, hidden))
        shapes |= dict.fromkeys(GATES, (self.held, hidden))
        self.up = nn.ParameterDict({name: self.made(self.held * inward, width) for name in shapes})
        self.down = nn.ParameterDict({name: self.made(*shape) for name, shape in shapes.items()})
        self.squash = nn.ParameterDict({name: self.made(self.held) for name in GATES})

    def forward(self, x_TBD: Tensor, scene: Scene, before: Left | None = None) -> tuple[Tensor, Left | None]:
        """(T, B, D) -> (T, B, D), and the memories after the last token."""
        heads, tail = self.project(x_TBD, scene, before and before.tail)
        momentum = self.momentum(heads, self.settings.rate) if self.settings.momentum else None
        q = unit(heads["q"]) if "q" in heads else heads["input"]  # which no memory hears, if one makes queries
        tokens = Tokens(heads["input"], q, momentum, scene.starts_BT)
        o, state = self_modifying(
            tokens,
            (self.settings.makers, self.settings.chunk),
            self.start(),
            self.gates(),
            before and before.state,
            scene.hand_on,
            self.settings.recompute,
        )
        return self.finish(o, x_TBD, heads), Left(state, tail) if state is not None else None

    def gates(self) -> Gates:
        """Slow constants of this rank's heads, and what is left out of the rule."""
        settings = self.settings
        rate, keep = (exact(self.exchange.mine(self.squash[name])) for name in GATES)
        keep = keep if settings.rate else keep + torch.inf
        erase, values = float(settings.erase), settings.unit_values
        kind = settings.clip, self.still(), settings.activation, settings.per_layer
        return Gates(rate, keep, settings.rate, erase, values, *kind)

    def still(self) -> Still:
        """Which memories stay as they began."""
        stays = {name: name not in self.settings.written for name in self.up}

        def mask(*names: str) -> Tensor | bool | None:
            held = [stays[name] for name in names]
            if all(held) or not any(held):
                return all(held) or None
            return torch.tensor(held, device=self.norm.weight.device)

        return Still(mask(*self.settings.vectors), mask(*GATES), stays["main"])

    def begin(self, rows: int) -> Left:
        """What a row begins with."""
        return Left(spread(begin(self.start(), self.settings.momentum), rows), self.no_tail(rows))

    def start(self) -> Memories:
        """The memories' initial states, of this rank's heads."""

        def net(*names: str) -> Net:
            parts = ([self.exchange.mine(weights[name]) for name in names] for weights in (self.up, self.down))
            return Net(*(stacked(part, self.heads) for part in parts))

        return Memories(net(*self.settings.vectors), net(*GATES), net("main"))

    def leaves(self) -> Iterator[Leaf]:
        """The base's, the memories' initial states, the gates' biases."""
        yield from super().leaves()
        for name in self.up:
            yield Leaf(f"memory.{name}.up", self.up[name], shard=0)
            yield Leaf(f"memory.{name}.down", self.down[name], shard=0)
        for name, bias in self.squash.items():
            yield Leaf(f"{name}.bias", bias, shard=0)
