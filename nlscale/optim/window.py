"""Windows: gradients gathered in float32 until their level is due (spec 2.2).

Backward adds into the window in place; nothing is copied and nothing crosses ranks. A window counts target tokens, so
its mean is exact for ragged micro-batches.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nlscale.runtime.leaf import Leaf


class Windows:
    """The accumulators of all parameters of this rank and the token counts of all levels."""

    def __init__(self, parameters: Iterable[nn.Parameter], levels: Sequence[str]) -> None:
        self.levels = list(levels)
        self.sums: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            if parameter not in self.sums:
                self.sums[parameter] = torch.zeros_like(parameter, dtype=window_dtype(parameter.dtype))
                self._attach(parameter)
        device = next(iter(self.sums)).device
        self.tokens = torch.zeros(len(self.levels), dtype=torch.int64, device=device)  # of this replica, by level
        self.open = dict.fromkeys(self.levels, 0)  # steps since a level last moved

    def _attach(self, parameter: nn.Parameter) -> None:
        window = self.sums[parameter]
        if window.dtype == parameter.dtype:
            parameter.grad = window  # autograd adds into a gradient that is there
        else:

            def add(parameter: nn.Parameter) -> None:
                assert parameter.grad is not None
                window.add_(parameter.grad)
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(add)

    def of(self, leaf: Leaf) -> Tensor:
        """The open sum of a leaf: a view, float32."""
        return leaf.of(self.sums[leaf.parameter])

    def count(self, tokens: Tensor) -> None:
        """Notes that a step's backward passes have added `tokens` (int64 scalar) targets to every window."""
        self.tokens += tokens
        for name in self.open:
            self.open[name] += 1

    def restart(self, level: str) -> None:
        """Notes that a level moved: its window holds nothing."""
        self.tokens[self.levels.index(level)].zero_()
        self.open[level] = 0


def window_dtype(dtype: torch.dtype) -> torch.dtype:
    """Windows are float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)
