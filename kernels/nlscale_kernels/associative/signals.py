"""Local surprise: what backpropagation tells each linear layer (spec 1, rows 2 and 3).

A step of SGD writes, into each layer's weight, the pair (input, gradient at the output). Seen so, a deep network under
backpropagation is one memory a layer, each of which gets its values from those after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Signal:
    """What one layer saw: inputs x (N, I) and errors u = dL/dy (N, O); N tokens of all rows."""

    x: Tensor | None = None
    u: Tensor | None = None

    def gradient(self) -> Tensor:
        """u^T x (O, I): the gradient of the layer's weight."""
        assert self.x is not None and self.u is not None, "no forward and backward pass was seen"
        return self.u.T @ self.x


@contextmanager
def signals(network: nn.Module) -> Iterator[dict[str, Signal]]:
    """Signals of all `nn.Linear` layers of a network, by name, from the forward and backward passes inside the context."""
    seen: dict[str, Signal] = {}
    handles = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            signal = seen[name] = Signal()

            def watch(_: nn.Module, inputs: tuple[Tensor], output: Tensor, signal: Signal = signal) -> None:
                signal.x = inputs[0].detach().flatten(0, -2)
                output.register_hook(lambda grad, signal=signal: setattr(signal, "u", grad.detach().flatten(0, -2)))

            handles.append(layer.register_forward_hook(watch))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
