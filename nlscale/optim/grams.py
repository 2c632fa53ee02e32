"""What linear layers read during a window: sums of x x^T over its tokens, for rules that forget along inputs (optim/dgd.py).

One matrix of inputs x inputs a linear layer and group. It stays on its replica until the boundary, whatever `reduce`
says; a micro-batch that is refused adds nothing to it.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nlscale.optim.partial import sum_over
from nlscale.optim.shard import Fragment
from nlscale.optim.window import Windows, window_dtype
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World


class Grams:
    """Sums of x x^T over a group's window, on this replica; what a checkpoint finds of them is like a window."""

    partial = True

    def __init__(self, leaves: Sequence[Leaf], windows: Windows, world: World) -> None:
        """`leaves`: those of one group that follow the rule."""
        self.windows, self.world = windows, world
        self.part, self.parts = world.copy, world.copies
        self.sums: dict[str, Leaf] = {}  # name of a product -> a leaf that stands for it
        self.of: dict[str, str] = {}  # leaf -> the product of its inputs
        by_linear: dict[nn.Module, list[tuple[str, Leaf]]] = {}
        for leaf in sorted(leaves, key=lambda leaf: leaf.name):  # names are the same on every layout
            assert leaf.linear is not None
            sliced = leaf.axis == leaf.meets  # its own inputs; otherwise it shares them with its neighbours
            held = by_linear.setdefault(leaf.linear, [])
            name = f"{leaf.name}.{'gram_cut' if leaf.shard == leaf.meets else 'gram'}"
            if held and not sliced:
                name = held[0][0]
            else:
                held.append((name, leaf))
                self.sums[name] = self.product(name, leaf)
            self.of[leaf.name] = name
        replicas, sizes = (
            world.copies,
            [leaf.value.numel() * leaf.value.element_size() for leaf in self.sums.values()],
        )
        self.bytes_a_close = 2 * (replicas - 1) * sum(sizes) // replicas  # an all-reduce on a ring
        for linear, held in by_linear.items():
            linear.register_forward_hook(lambda _, given, out, held=held: self.watch(given[0], out, held))

    def product(self, name: str, leaf: Leaf) -> Leaf:
        """A leaf that stands for the inputs' product: partial where each rank sees a part of the tokens."""
        cut = leaf.shard == leaf.meets
        side = leaf.value.shape[leaf.meets] * (self.world.tensor.size() if cut else 1)
        dtype = window_dtype(leaf.value.dtype)
        values = torch.zeros(side, side, dtype=dtype, device=leaf.value.device)
        return Leaf(name, nn.Parameter(values, requires_grad=False), partial=leaf.scattered)

    def watch(self, x: Tensor, out: tuple[Tensor, ...], held: Sequence[tuple[str, Leaf]]) -> None:
        """Adds the products when backward reaches the layer; a refused micro-batch, whose gradient is NaN, adds none."""
        given = x.detach()
        if out[0].requires_grad:
            out[0].register_hook(lambda grad: self.add(given, grad.sum().isfinite(), held))

    @torch.no_grad()
    def add(self, x: Tensor, accept: Tensor, held: Sequence[tuple[str, Leaf]]) -> None:
        """`x`: (..., inputs of this rank)."""
        for name, leaf in held:
            own = x.flatten(0, -2)
            if leaf.axis == leaf.meets and not leaf.whole:
                own = own[:, leaf.start : leaf.start + (leaf.length or 0)]
            if leaf.shard == leaf.meets and self.world.tensor.size() > 1:
                cuts = [torch.empty_like(own) for _ in range(self.world.tensor.size())]
                dist.all_gather(cuts, own.contiguous(), group=self.world.tensor)
                own = torch.cat(cuts, dim=1)
            wide = own.to(self.sums[name].value.dtype)
            self.sums[name].value.add_(torch.where(accept, wide.mT @ wide, 0.0))

    @torch.no_grad()
    def close(self, mean: float) -> None:
        """Hands the rule its means; the sums are zero after. A collective. `mean`: 1 / tokens of the window."""
        sums = [leaf.value for leaf in self.sums.values()]
        sum_over([leaf.value for leaf in self.sums.values() if leaf.partial], self.world.tensor)
        sum_over(sums, self.world.data)
        means = {name: leaf.value * mean for name, leaf in self.sums.items()}
        self.windows.inputs.update({leaf: means[name] for leaf, name in self.of.items()})
        torch._foreach_zero_(sums)

    def open(self) -> Iterator[Fragment]:
        """The open sums."""
        for leaf in self.sums.values():
            yield Fragment(leaf, 0, {"window": leaf.value.view(-1)})
