"""Memories that never begin anew (`model.reset: never`): what a step's rows leave is what the next step's rows go on with.

A chunk of the model holds one state a micro-batch. Gradients end where a step ends: what came in is taken as given. A
micro-batch whose loss (parallel/gate.py) or whose memory was not finite leaves what it came with.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.model.hope import Hope
from nlscale.model.row_state import RowState, mapped


class Carried:
    """The memories of one chunk of the model, over all rows of this replica."""

    def __init__(self, model: Hope, micro_batches: int, rows: int, sharing: Sequence[dist.ProcessGroup]) -> None:
        """`rows`: of a micro-batch; `sharing`: groups of ranks that hold parts of the same memories."""
        self.model, self.rows, self.sharing = model, rows, sharing
        self.held: list[RowState | None] = [None] * micro_batches
        self.left: list[tuple[RowState, RowState]] = []  # of the step's micro-batches so far: what came, what is left

    def state(self, place: int) -> RowState:
        """What the next rows of a micro-batch begin with."""
        return self.held[place] or self.model.begin(self.rows)

    def read(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The forward pass of the step's next micro-batch."""
        before = self.state(len(self.left))
        output, after = self.model.onward(batch, before, hand_on=True)
        self.left.append((before, mapped(lambda _, part: part.detach(), "", after)))
        return output

    @torch.no_grad()
    def settle(self, accepted: Sequence[Tensor]) -> None:
        """Ends a step; `accepted`: whether each micro-batch counted, none where this chunk learns nothing.

        No loss has seen what the row's last tokens wrote, so that is looked at, too. A collective over `sharing`.
        """
        if not self.left:
            return
        sound = torch.stack([finite(after) for _, after in self.left])
        if accepted:
            sound = sound & torch.stack(list(accepted))
        sound = sound.int()
        for group in self.sharing:
            dist.all_reduce(sound, op=dist.ReduceOp.MIN, group=group)
        for place, ((before, after), good) in enumerate(zip(self.left, sound.bool(), strict=True)):
            kept = mapped(lambda _, new, old, good=good: torch.where(good, new, old), "", after, before)
            self.held[place] = mapped(lambda _, part: part.detach(), "", kept)
        self.left.clear()

    def open(self) -> list[RowState]:
        """The states themselves, one a micro-batch, to be saved or written over."""
        for place in range(len(self.held)):
            if self.held[place] is None:
                self.held[place] = mapped(lambda _, part: part.detach().clone(), "", self.state(place))
        return [state for state in self.held if state is not None]


def finite(state: RowState) -> Tensor:
    """Whether all of a state is: a bool scalar."""
    found: list[Tensor] = []
    mapped(lambda _, part: found.append(part.isfinite().all()), "", state)
    return torch.stack(found).all() if found else torch.tensor(True)
