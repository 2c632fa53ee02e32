"""Several layers that learn inside a row, against their definition, token by token (I10). float64.

Every token's loss is that of a pass over its chunk so far, which goes on from what earlier chunks left to the mixers. The
weights of all learning layers are the row's own.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nlscale.config.run import Run
from nlscale.model.in_sequence import HopeInSequence
from nlscale.model.row_state import mapped
from nlscale.testing import ranks
from tests.model.test_in_sequence import BASE, TWO, batch, model_of, slices
from tests.tiny import tiny

SAID = [TWO, *BASE, "model.layers=3", "model.inner.layers=2"]
MIXERS = {
    "attention": [],
    "chain": ["model.variant=sequential"],
    "delta": ["model.mixer=delta", "model.linear.chunk=4"],
    "self_modifying": [
        "model.mixer=self_modifying",
        "model.self_modifying.chunk=2",
        "model.self_modifying.maker_chunk=4",
    ],
}


class Suffix(nn.Module):
    """The learning layers, and the head: the loss of the last of some tokens, and what the mixers leave."""

    def __init__(self, model: HopeInSequence) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, states: list[Any], starts: Tensor, first: int, target: Tensor) -> tuple[Tensor, list]:
        model, left = self.model, []
        place = model.scene(starts, first, hand_on=True)
        for block, state in zip(model.blocks[model.first :], states, strict=True):
            x, after = block.mix(x, place, state)
            x = block.continuum(x)
            left.append(after)
        return model.head(x[-1:], target), left


class Row:
    """One row: weights of its own, and what its levels have gathered."""

    def __init__(self, model: HopeInSequence, run: Run) -> None:
        self.model, self.inner = model, run.model.inner
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.levels = {level.name: level for level in run.levels if level.unit == "token"}
        self.begin()

    def begin(self) -> None:
        """As rows, and documents, begin."""
        self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.windows: dict[str, list[list[Tensor]]] = {name: [] for name in self.levels}

    def own(self, level: str) -> list[tuple[str, Tensor]]:
        """(parameter, rows) of a level's weights in all learning layers."""
        blocks = range(self.model.first, len(self.model.blocks))
        return [(self.names[p], rows) for block in blocks for p, rows in slices(self.model, block)[level]]

    def loss(self, *given: Any, counts: bool) -> tuple[Tensor, list[Any]]:
        """Of one token, whose gradient is gathered if it counts."""
        own = {f"model.{name}": w.clone().requires_grad_() for name, w in self.weights.items()}
        loss, left = functional_call(Suffix(self.model), own, given)
        if counts:
            slopes = dict(
                zip(self.weights, torch.autograd.grad(loss, list(own.values()), allow_unused=True), strict=True)
            )
            for level in self.levels:
                self.windows[level].append([slopes[name][rows] for name, rows in self.own(level)])
        return loss.detach() * counts, left

    def move(self, tokens: int) -> None:
        """Levels that are due after so many tokens; one clip over all their layers."""
        for name, level in self.levels.items():
            gathered = self.windows[name]
            if tokens % level.period == 0:
                mean = [sum(parts) / len(gathered) for parts in zip(*gathered, strict=True)]
                norm = sum(float(part.square().sum()) for part in mean) ** 0.5
                step = self.inner.lr * level.inner * min(1.0, self.inner.clip / (norm + 1e-6))
                for (parameter, rows), part in zip(
                    self.own(name), mean, strict=False
                ):  # nothing, where nothing counted
                    self.weights[parameter][rows] -= step * part
                self.windows[name] = []


def by_hand(model: HopeInSequence, run: Run, tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
    """The loss of one row."""
    row, total, size = Row(model, run), torch.zeros((), dtype=torch.float64), model.rhythm.chunk
    with torch.no_grad():
        x, place = model.enter(tokens), model.scene(starts)
        for block in model.blocks[: model.first]:
            x, _ = block(x, place, None)
    states: list[Any] = [None] * (len(model.blocks) - model.first)
    for first in range(0, tokens.shape[1], size):
        for t in range(first, first + size):
            if starts[0, t]:
                row.begin()
            here = slice(t, t + 1)
            given = x[first : t + 1], states, starts[:, : t + 1], first, targets[:, here]
            loss, left = row.loss(*given, counts=bool(targets[0, t] >= 0))
            total = total + loss
        states = [mapped(lambda _, part: part.detach(), "", each) for each in left]
        row.move(first + size)
    return total


def both(run: Run) -> tuple[Tensor, Tensor]:
    """The loss of rows together, and of each by hand."""
    model, rows = model_of(run), batch(run)
    with torch.no_grad():
        together = model(*rows)
    each = [by_hand(model, run, *(part[b : b + 1] for part in rows)) for b in range(rows[0].shape[0])]
    return together, torch.stack(each).sum()


@pytest.mark.parametrize("mixer", MIXERS)
def test_i10_over_two_layers_is_token_by_token(mixer: str) -> None:
    together, separate = ranks(1, both, tiny(*SAID, *MIXERS[mixer]))[0]
    still, _ = ranks(1, both, tiny(*SAID, *MIXERS[mixer], "model.inner.lr=0.0"))[0]
    torch.testing.assert_close(together, separate, rtol=1e-12, atol=0)
    assert abs(float(together - still)) > 1e-5 * float(still)
