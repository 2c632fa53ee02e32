"""A micro-batch whose loss is not finite adds nothing to any window (spec 3.10).

Windows gather gradients of many steps in place, so one bad gradient would spoil them all. The last stage sees the loss
before backward: where it is not finite, it sends NaN back, which every stage before it understands. Each stage then
replaces the gradients of that micro-batch by zeros and does not count its targets; the mean of a window stays exact.
On a GPU decisions are made on the device and the host reads nothing; on a CPU the host branches, which costs nothing.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Gate:
    """What one chunk of a rank does with the gradients of each micro-batch."""

    def __init__(self, parameters: Iterable[nn.Parameter], sequence: Sequence[dist.ProcessGroup]) -> None:
        """`sequence`: groups of ranks that share a micro-batch along its sequence; each sees a part of what is sent back."""
        held, self.sequence = list(parameters), sequence
        for parameter in held:
            parameter.register_hook(self.masked if parameter.is_cuda else self.branched)
        self.waiting: deque[Tensor] = deque()  # targets of the micro-batches that are on their way
        self.accept = torch.ones((), dtype=torch.bool, device=held[0].device)
        self.accepted = True  # the same, as the host knows it on a CPU
        self.accepts: list[Tensor] = []  # the decisions of the step so far
        self.zero = torch.zeros((), dtype=held[0].dtype, device=held[0].device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=held[0].device)  # targets added; micro-batches refused

    def restart(self) -> None:
        """Begins a step."""
        self.waiting.clear()
        self.accepts.clear()
        self.counts = torch.zeros_like(self.counts)

    def guard(self, output: Tensor, targets: Tensor) -> None:
        """Decides in the backward pass of a stage's output: of its loss, or of the activations that it sends on.

        `targets`: of the micro-batch, int64 scalar.
        """
        if output.requires_grad:
            self.waiting.append(targets)
            loss = output.detach() if output.ndim == 0 else None
            output.register_hook(lambda grad: self.entered(grad, grad.sum() if loss is None else loss))

    def entered(self, grad: Tensor, seen: Tensor) -> Tensor:
        """The gradient that a backward pass of the chunk begins with; NaN, for every stage to see, where it is refused."""
        self.decide(seen.isfinite())
        return torch.where(self.accept, grad, torch.nan)

    def decide(self, finite: Tensor) -> None:
        """Takes the decision on the micro-batch whose backward pass begins."""
        for group in self.sequence:
            finite = finite.int()
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=group)
            finite = finite.bool()
        self.accept = finite
        self.accepts.append(finite)
        self.accepted = finite.is_cuda or bool(finite)
        added = torch.where(finite, self.waiting.popleft().double(), 0.0)
        self.counts += torch.stack([added, (~finite).double()])

    def masked(self, grad: Tensor) -> Tensor:
        """The gradient, or zeros."""
        return torch.where(self.accept, grad, self.zero)

    def branched(self, grad: Tensor) -> Tensor:
        """The same by a branch."""
        return grad if self.accepted else torch.zeros_like(grad)
