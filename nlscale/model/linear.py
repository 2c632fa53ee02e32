"""Linear attention and the gated delta rule as mixers (spec 1, rows 6, 7, 26).

Under context parallelism tokens stay where they are: what a run of tokens does to a matrix memory is an affine map, so each
rank tells the others its own, and takes up the state that the ranks before it leave (spec 3.9, V21).
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.linear_memory import Affine, Tokens, affine, compose, fla, linear_memory
from nlscale_kernels.unit import unit
from torch import Tensor

from nlscale.config.errors import require
from nlscale.config.model import Model
from nlscale.model.exchange import Exchange
from nlscale.model.heads import HeadMixer, Heads, exact, tail_of
from nlscale.model.scene import Scene
from nlscale.runtime.leaf import Leaf


class Matrix(NamedTuple):
    """What a matrix memory hands on: its state (B, H, V, K) and the convolution's last tokens (B, H, t, K) by name."""

    state: Tensor
    tail: Heads | None


Memory = Callable[..., tuple[Tensor, Tensor]]


def memory_of(model: Model) -> Memory:
    """Whose kernels compute it; raises UserError where they are not installed."""
    if model.linear.kernels == "own":
        return linear_memory
    require(torch.cuda.is_available(), "model.linear.kernels=fla needs an NVIDIA GPU; own would work")
    require(fla.available(), "model.linear.kernels=fla needs fla-core: `pip install fla-core`; own would work")
    why = fla.refused(import_module("triton").__version__, torch.cuda.get_device_capability())
    require(not why, f"model.linear.kernels=fla: {why}; own would work")
    return fla.by_fla


class LinearMixer(HeadMixer):
    """x + out(memory(norm(x))) with a matrix a head."""

    def __init__(self, model: Model, config: TransformerConfig, exchange: Exchange) -> None:
        parts = {"q": model.head_width, "k": model.head_width, "v": model.head_width}
        parts |= {"rate": 1, "keep": 1, "gate": model.head_width}
        convolved = ("q", "k", "v")
        super().__init__(model, config, Exchange(), parts, model.linear.convolution, convolved, ("gate",))
        self.rate, self.memory = model.linear.rate, memory_of(model)
        self.row, self.rule, self.chunk = exchange, model.mixer, model.linear.chunk
        self.start = self.made(self.held * self.width, self.width)

    def forward(self, x_TBD: Tensor, scene: Scene, before: Matrix | None = None) -> tuple[Tensor, Matrix | None]:
        """(T, B, D) -> (T, B, D), and the memory after the last token."""
        own = scene
        if self.row.ranks > 1 and scene.starts_BT is not None:
            own = scene._replace(starts_BT=self.row.tokens(scene.starts_BT, 1))
        heads, tail = self.project(x_TBD, own, before and before.tail)
        tokens = Tokens(
            heads["q"] * self.width**-0.5,
            unit(heads["k"]),
            heads["v"],
            self.rate * self.gate(heads, "rate").sigmoid(),
            self.keep(heads, self.rate),
            own.starts_BT,
        )
        initial = exact(self.start).unflatten(0, (self.held, self.width))
        state = self.incoming(tokens, initial, before and before.state)
        o, state = self.memory(self.rule, tokens, self.chunk, initial, state)
        left = Matrix(self.row.last(state), tail) if scene.hand_on else None
        return self.finish(o, x_TBD, heads), left

    def begin(self, rows: int) -> Matrix:
        """What a row begins with."""
        initial = exact(self.start).unflatten(0, (self.held, self.width))
        return Matrix(initial.expand(rows, *initial.shape), self.no_tail(rows))

    def convolve(self, joined_TBF: Tensor, scene: Scene, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """With context parallelism the tokens before this rank's come from the rank before."""
        if self.row.ranks > 1 and self.taps is not None:
            starts_TB = None if scene.starts_BT is None else scene.starts_BT.t()
            tails = self.row.everyone(tail_of(joined_TBF, None, starts_TB, self.taps.shape[1] - 1))
            came = 0.0 if self.row.rank or tail is None else tail
            tail = tails[self.row.rank - 1] * float(self.row.rank > 0) + came  # rank 0 is in every rank's backward too
            joined_TBF, _ = super().convolve(joined_TBF, scene, tail)
            return joined_TBF, tails[-1] if scene.hand_on else None
        return super().convolve(joined_TBF, scene, tail)

    def incoming(self, tokens: Tokens, initial_HVK: Tensor, state: Tensor | None) -> Tensor | None:
        """The state that the ranks before this one leave."""
        if self.row.ranks == 1:
            return state
        own = affine(self.rule, tokens, self.chunk, initial_HVK)
        kept, added = (self.row.everyone(part) for part in own)
        state = initial_HVK.unsqueeze(0).expand(added.shape[1:]) if state is None else state
        if not self.row.rank:  # hears of the others all the same: what it hears must reach every rank's backward
            return state + 0 * (kept.sum() + added.sum())
        runs = [Affine(kept[i], added[i]) for i in range(self.row.ranks)]
        total = runs[0]
        for each in runs[1 : self.row.rank]:
            total = compose(total, each)
        rest = sum(part.sum() for each in runs[self.row.rank :] for part in each)
        return state @ total.kept + total.added + 0 * rest

    def leaves(self) -> Iterator[Leaf]:
        """The base's, and the initial state."""
        yield from super().leaves()
        yield Leaf("memory.start", self.start, shard=0)
