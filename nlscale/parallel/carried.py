"""Memories that never begin anew (`model.reset: never`): what a step's rows leave is what the next step's rows go on with.

A chunk of the model holds one state a micro-batch. Gradients end where a step ends: what came in is taken as given. A
micro-batch whose loss was not finite (parallel/gate.py) leaves what it came with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlscale.model.hope import Hope
from nlscale.model.row_state import RowState, mapped


class Carried:
    """The memories of one chunk of the model, over all rows of this replica."""

    def __init__(self, model: Hope, micro_batches: int, rows: int) -> None:
        """`rows`: of a micro-batch."""
        self.model, self.rows = model, rows
        self.held: list[RowState | None] = [None] * micro_batches
        self.left: list[tuple[RowState, RowState]] = []  # of the step's micro-batches so far: what came, what is left

    def state(self, place: int) -> RowState:
        """What the next rows of a micro-batch begin with."""
        return self.held[place] or self.model.begin(self.rows)

    def read(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The forward pass of the step's next micro-batch."""
        before = self.state(len(self.left))
        output, after = self.model.onward(batch, before, hand_on=True)
        self.left.append((before, after))
        return output

    @torch.no_grad()
    def settle(self, accepted: Sequence[Tensor]) -> None:
        """Ends a step; `accepted`: whether each micro-batch counted, none where this chunk learns nothing."""
        for place, (before, after) in enumerate(self.left):
            if accepted:
                after = mapped(lambda _, new, old, said=accepted[place]: torch.where(said, new, old), "", after, before)
            self.held[place] = mapped(lambda _, part: part.detach(), "", after)
        self.left.clear()

    def open(self) -> list[RowState]:
        """The states themselves, one a micro-batch, to be saved or written over."""
        for place in range(len(self.held)):
            if self.held[place] is None:
                self.held[place] = mapped(lambda _, part: part.detach().clone(), "", self.state(place))
        return [state for state in self.held if state is not None]
