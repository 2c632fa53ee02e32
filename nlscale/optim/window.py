"""Windows: gradients gathered in float32 until their level is due (spec 2.2).

Backward adds into the window in place; nothing is copied and nothing crosses ranks. A window counts target tokens, so
its mean is exact for ragged micro-batches. Where gradients are reduced every step (`reduce` eager or hierarchical) the
sums live for one step only: they come with its first gradient and go with `release`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nlscale.runtime.leaf import Leaf


class Windows:
    """The accumulators of all parameters of this rank and the token counts of all groups."""

    def __init__(self, parameters: Iterable[nn.Parameter], groups: Sequence[str], lasting: bool = True) -> None:
        """`lasting`: sums stay from step to step; otherwise `release` gives their memory back."""
        self.groups, self.lasting = list(groups), lasting
        self.sums: dict[nn.Parameter, Tensor | None] = dict.fromkeys(parameters)
        for parameter in self.sums:
            if lasting:
                self._make(parameter)
            if not lasting or window_dtype(parameter.dtype) != parameter.dtype:
                parameter.register_post_accumulate_grad_hook(self._add)
        device = next(iter(self.sums)).device
        self.tokens = torch.zeros(len(self.groups), dtype=torch.float64, device=device)  # of this replica, by group
        self.open = dict.fromkeys(self.groups, 0)  # steps since a group last moved
        # Leaf -> mean x x^T of its closed window, for rules that ask (optim/dgd.py).
        self.inputs: dict[str, Tensor] = {}

    def _make(self, parameter: nn.Parameter) -> Tensor:
        window = torch.zeros_like(parameter, dtype=window_dtype(parameter.dtype))
        self.adopt(parameter, window)
        return window

    def adopt(self, parameter: nn.Parameter, window: Tensor) -> None:
        """Gathers a parameter's gradients in `window` from now on."""
        self.sums[parameter] = window
        if window.dtype == parameter.dtype:
            parameter.grad = window  # autograd adds into a gradient that is there

    def _add(self, parameter: nn.Parameter) -> None:
        grad, window = parameter.grad, self.sums[parameter]
        assert grad is not None
        if window is None and grad.dtype == window_dtype(grad.dtype):
            self.sums[parameter] = grad  # the step's first gradient is its sum so far
        elif grad is not window:
            (self._make(parameter) if window is None else window).add_(grad)
            parameter.grad = None

    def of(self, leaf: Leaf) -> Tensor:
        """The open sum of a leaf: a view, float32."""
        window = self.sums[leaf.parameter]
        return leaf.of(self._make(leaf.parameter) if window is None else window)

    def fill(self) -> None:
        """Makes every sum that is not there: what a step's first micro-batch leaves to the others."""
        for parameter, window in self.sums.items():
            if window is None:
                self._make(parameter)

    def release(self) -> None:
        """Gives back the memory of all sums that do not last; they were read."""
        if not self.lasting:
            for parameter in self.sums:
                self.sums[parameter] = parameter.grad = None

    def count(self, tokens: Tensor) -> None:
        """Notes that a step's backward passes have added `tokens` targets: to every window, or one number a group."""
        self.tokens += tokens
        for name in self.open:
            self.open[name] += 1

    def restart(self, groups: Iterable[str]) -> None:
        """Notes that these groups moved: their windows hold nothing."""
        for name in groups:
            self.tokens[self.groups.index(name)].zero_()
            self.open[name] = 0


def window_dtype(dtype: torch.dtype) -> torch.dtype:
    """Windows are float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)
