"""The continuum inside a sequence: levels that move every so many tokens of a row (spec 2.3, Modes I and S).

The first layers pass a whole row at once. The last ones, and the head, go through it chunk by chunk: a chunk is predicted
with what the row's own copies of the levels have learned so far, then its loss moves the copies that are due. The reported
loss is that of each chunk before it was learned from. Attention and memories of the mixers go on from chunk to chunk. Where
documents are apart each begins with the weights that rows begin with (but for one memory of all rows, Mode S).

The gradient that a level learns from is that of the chunk's loss at the level's own place, back through everything after it,
with what earlier chunks left taken as given. It never leaves the last pipeline stage. Context-parallel ranks, which share
the tokens of rows before, have whole rows here, each its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.summed_loss import whole_loss
from torch import Tensor, nn

from nlscale.config.inner import Inner
from nlscale.config.levels import Level, due
from nlscale.config.model import Model
from nlscale.model.attention import by_math
from nlscale.model.collectives import column, cross_entropy, from_tensor_ranks, row, to_tensor_ranks
from nlscale.model.continuum import Heard, Trace
from nlscale.model.exchange import Exchange
from nlscale.model.fast import Documents, Factors, Fast, Pair, Whole, Window, documents, product
from nlscale.model.hope import Block, Hope, Stage
from nlscale.model.layers import Down
from nlscale.model.loss import IGNORE
from nlscale.model.row_state import RowState, between_rows, check
from nlscale.model.scene import Scene

Copies = list[dict[str, dict[str, Fast]]]  # adaptive block -> level -> part of the feed-forward -> what it learned
Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rhythm:
    """The levels that move inside a row, fast to slow, and what they ask of ranks."""

    levels: Sequence[Level]
    over_data: Sum  # sums over replicas

    @property
    def chunk(self) -> int:
        """Tokens between two moves of the fastest."""
        return self.levels[0].period

    def due(self, tokens: int) -> list[Level]:
        """Levels that move when so many tokens of a row were seen: the same clock as between steps, counted in tokens."""
        return [level for level in self.levels if due(level, tokens, unit="token")]


class ReadingBlock(Block):
    """A block whose levels have copies that a row has changed."""

    def forward(  # type: ignore[override]
        self, x_TBD: Tensor, scene: Scene, before: Any, copy: dict[str, dict[str, Fast]], heard: Heard
    ) -> tuple[Tensor, Any, dict[str, Trace]]:
        """(T, B, D) -> (T, B, D), what the mixer hands on, and what each level saw."""
        x_TBD, left = self.mix(x_TBD, scene, before)
        x_TBD, traces = self.continuum.adaptive(x_TBD, copy, heard)
        return x_TBD, left, traces


class HopeInSequence(Hope):
    """The last stage of a network whose last layers learn while they read."""

    def __init__(
        self,
        model: Model,
        units: Mapping[str, int],
        tokens: int,
        config: TransformerConfig,
        stage: Stage,
        exchange: Exchange,
        rhythm: Rhythm,
    ) -> None:
        """As Hope's."""
        super().__init__(model, units, tokens, config, stage, exchange)
        self.inner: Inner = model.inner
        self.pace = 1.0  # factor on the inner rate, which rises while the run is young
        self.rhythm, self.first = rhythm, len(self.blocks) - model.inner.adaptive(model.layers)
        self.kinds = {level.name: self.kept(model, units[level.name], tokens) for level in rhythm.levels}
        if model.inner.meta == "full":
            self.head.summed = whole_loss  # it can be differentiated twice
            if config.tensor_model_parallel_size > 1:
                self.head.cross_entropy = cross_entropy
            adaptive = self.blocks[self.first :]
            crossed = [block.continuum for block in adaptive] + [block.mix for block in adaptive[1:]]
            for module in (each for half in crossed for each in half.modules()):  # type: ignore[union-attr]
                differentiable(module)

    def kind_of(self, layer: int, model: Model) -> type[Block]:
        """The last layers adapt."""
        return ReadingBlock if layer >= model.layers - model.inner.adaptive(model.layers) else Block

    def around(self, layer: int, model: Model) -> Exchange:
        """A rank has whole rows where they are learned from, fewer of them."""
        return self.exchange if self.kind_of(layer, model) is Block else Exchange()

    def kept(self, model: Model, units: int, tokens: int) -> type[Fast]:
        """How a level's changes are kept: by pairs while a row's writes are fewer than a matrix."""
        young = model.reset == "row" and model.inner.by_factors(model.width, units, tokens - self.rhythm.chunk)
        return Factors if young else Whole

    def onward(
        self, batch: tuple[Tensor, Tensor, Tensor], before: RowState | None = None, hand_on: bool = False
    ) -> tuple[Tensor, RowState]:
        """The summed loss (scalar), each chunk's before it is learned from, and what the rows leave."""
        tokens_BT, targets_BT, starts_BT = batch
        x_TBD: Any = self.enter(self.exchange.tokens(tokens_BT, 1)) if self.stage.first else self.input
        if before is not None:
            check(before, self.begin(tokens_BT.shape[0]), "state")
        mixers, place = list(before.mixers) if before else [None] * len(self.blocks), self.scene(starts_BT, 0, hand_on)
        left: list[Any] = []
        for block, state in zip(self.blocks[: self.first], mixers, strict=False):
            x_TBD, after = block(x_TBD, place, state)
            left.append(after)
        x_TBD, targets_BT, starts_BT = self.exchange.to_rows(x_TBD), self.own(targets_BT), self.exchange.mine(starts_BT)
        learning = torch.is_grad_enabled()
        with torch.enable_grad():  # the copies learn whether or not anybody else does
            own = RowState(self.mixer, mixers[self.first :], before.copies if before else self.untouched())
            loss, after = self.read(x_TBD if learning else x_TBD.detach(), targets_BT, starts_BT, own, hand_on)
        left = [between_rows(each) for each in (*left, *after.mixers)]
        return loss if learning else loss.detach(), RowState(self.mixer, left, after.copies)

    def own(self, batch: Tensor) -> Tensor:
        """Those of this rank's rows."""
        return self.exchange.mine(batch)

    def begin(self, rows: int) -> RowState:
        """What rows begin with that go on from no others."""
        own = rows // self.exchange.ranks
        several = 1 if self.inner.shared else own
        blank = [
            {level: {part: Whole(self.blank(level, several)) for part in parts} for level, parts in copy.items()}
            for copy in self.untouched()
        ]
        mixers = [block.mix.begin(own if place >= self.first else rows) for place, block in enumerate(self.blocks)]  # type: ignore[union-attr,operator]
        return RowState(self.mixer, mixers, blank)

    def blank(self, level: str, rows: int) -> Tensor:
        """A change that is none, as a matrix."""
        weight = self.blocks[-1].continuum.of(level).down.weight  # type: ignore[union-attr,operator]
        return weight.new_zeros(rows, self.blocks[-1].continuum.of(level).units[level], weight.shape[1])  # type: ignore[union-attr,operator]

    def untouched(self) -> Copies:
        """Copies that have learned nothing."""
        parts = [*self.blocks[0].continuum.inward, "down"]  # type: ignore[union-attr,misc]
        return [
            {level.name: {part: self.kinds[level.name]() for part in parts} for level in self.rhythm.levels}
            for _ in self.blocks[self.first :]
        ]

    def read(
        self,
        x_TBD: Tensor,
        targets_BT: Tensor,
        starts_BT: Tensor,
        before: RowState | None = None,
        hand_on: bool = False,
    ) -> tuple[Tensor, RowState]:
        """Summed loss of the row and what the adaptive blocks leave; `before`: what earlier rows of each sequence left.

        `hand_on`: somebody reads on, so the last chunk moves the copies too.
        """
        _, states, copies = before or RowState(self.mixer, [None] * (len(self.blocks) - self.first), self.untouched())
        losses, chunk = [], self.rhythm.chunk
        windows = {level.name: Window() for level in self.rhythm.levels}
        for begin in range(0, x_TBD.shape[0], chunk):
            end = begin + chunk
            place, own = self.scene(starts_BT[:, :end], begin, hand_on=True), self.documents(starts_BT[:, begin:end])
            x, traces, states = self.pass_on(x_TBD[begin:end], place, states, copies, heard(own, windows))
            loss = self.head(x, targets_BT[:, begin:end])
            if hand_on or end < x_TBD.shape[0]:
                copies = self.learned(loss, traces, targets_BT[:, begin:end], own, windows, copies, end)
            losses.append(loss)
        return torch.stack(losses).sum(), RowState(self.mixer, states, copies)

    def documents(self, starts_BT: Tensor) -> Documents | None:
        """Those of a chunk; None where rows are one document each, or share what they learn."""
        return documents(starts_BT) if self.apart and not self.inner.shared else None

    def pass_on(
        self, x_TBD: Tensor, place: Any, states: list[Any], copies: Copies, heard: Heard
    ) -> tuple[Tensor, list[dict[str, Trace]], list[Any]]:
        """A chunk, or a part of one, through the adaptive blocks; `heard`: by level, the tokens that hear it."""
        traces: list[dict[str, Trace]] = []
        left: list[Any] = []
        for block, state, copy in zip(self.blocks[self.first :], states, copies, strict=True):
            x_TBD, after, trace = block(x_TBD, place, state, copy, heard)
            traces.append(trace)
            left.append(after)
        return x_TBD, traces, left

    def learned(
        self,
        loss: Tensor,
        traces: Sequence[dict[str, Trace]],
        targets_BT: Tensor,
        own: Documents | None,
        windows: dict[str, Window],
        copies: Copies,
        end: int,
    ) -> Copies:
        """The copies after a chunk, which ends after `end` tokens of the row: levels that are due have moved theirs."""
        counted_BT = targets_BT != IGNORE
        if own is not None:
            counted_BT = counted_BT & own.last_BT
            for window in windows.values():
                window.go_on(own)
        self.gather(loss, traces, counted_BT.sum(1), windows)
        for level in self.rhythm.due(end):
            copies = self.move(level, copies, windows[level.name])
            windows[level.name] = Window()
        return copies

    def gather(
        self, loss: Tensor, traces: Sequence[dict[str, Trace]], targets_B: Tensor, windows: dict[str, Window]
    ) -> None:
        """Adds a chunk's gradient, as pairs, to the windows of all levels."""
        seen = [trace for block in traces for trace in block.values()]
        wanted = [tensor for trace in seen for tensor in (*trace.hidden.values(), trace.update)]
        full = self.inner.meta == "full"
        slopes = iter(torch.autograd.grad(loss, wanted, create_graph=full, retain_graph=True))
        keep = (lambda t: t) if full else torch.Tensor.detach
        for j, block in enumerate(traces):
            for name, trace in block.items():
                window = windows[name]
                pairs = {part: Pair(rows(next(slopes)), rows(keep(trace.normed))) for part in trace.hidden}
                pairs["down"] = Pair(rows(keep(trace.active)), rows(to_tensor_ranks(next(slopes))))
                for part, pair in pairs.items():
                    window.pairs.setdefault((j, part), []).append(pair)
        for window in windows.values():
            window.targets = window.targets + targets_B

    def move(self, level: Level, copies: Copies, window: Window) -> Copies:
        """One step of SGD of a level's copies on the mean gradient of its window, clipped a sequence."""
        gathered: dict[tuple[int, str], Any] = dict(window.gathered)
        targets = torch.as_tensor(window.targets, dtype=torch.float32)
        if self.inner.shared:
            targets = self.rhythm.over_data(targets.sum(0, keepdim=True))
            gathered = {key: self.rhythm.over_data(product(p).sum(0, keepdim=True)) for key, p in gathered.items()}
        some = next(iter(window.pairs.values()))[0].left
        mean = 1 / targets.clamp(min=1).to(some.dtype)
        rate = self.pace * self.inner.lr * level.inner * mean
        if self.inner.clip:
            squares = [square(each) for each in gathered.values()]
            norm = from_tensor_ranks(torch.stack(squares).sum(0)).clamp(min=1e-24).sqrt() * mean
            rate = to_tensor_ranks(rate * (self.inner.clip / (norm + 1e-6)).clamp(max=1.0))
        return [
            copy
            | {
                level.name: {
                    part: fast.written(gathered[j, part], rate, window.alive_B)
                    for part, fast in copy[level.name].items()
                }
            }
            for j, copy in enumerate(copies)
        ]


def heard(own: Documents | None, windows: Mapping[str, Window]) -> Heard:
    """By level, the tokens of a chunk that hear what it has learned; None: all."""
    return None if own is None else {name: window.heard(own.heard_BT) for name, window in windows.items()}


def differentiable(module: nn.Module) -> None:
    """Has a layer compute what can be differentiated twice, its sums over ranks included."""
    if isinstance(module, ColumnParallelLinear):
        module.forward = partial(column, module)
    elif isinstance(module, RowParallelLinear):
        module.forward = partial(row, module, torch.matmul if isinstance(module, Down) else F.linear)
    elif hasattr(module, "product"):
        module.product = by_math  # type: ignore[assignment]


def rows(part_TBF: Tensor) -> Tensor:
    """(T, B, F) -> (B, T, F)."""
    return part_TBF.transpose(0, 1)


def square(gathered: Tensor | list[Pair]) -> Tensor:
    """Squared norm of a gradient, a row."""
    if isinstance(gathered, Tensor):
        return gathered.square().sum((1, 2))
    joined = Pair(torch.cat([p.left for p in gathered], 1), torch.cat([p.right for p in gathered], 1))
    return joined.square()
