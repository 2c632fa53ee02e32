"""Leaves: the learnable tensors by their global names, whatever storage holds them on this rank.

Matrix products want few large weights, levels want many small ones. So a stored parameter may hold several leaves side
by side (the levels of a feed-forward, the projections of attention), and every table of the house (initial value, level,
optimizer, checkpoint) speaks of leaves.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn


@dataclass(frozen=True)
class Leaf:
    """One learnable tensor: `length` rows or columns of a stored parameter.

    `shard` is the axis that tensor parallelism splits (None: every rank holds it whole); `partial` says that its
    gradient is a partial sum over tensor-parallel ranks (sequence parallelism, gains of levels). `tied` says that the
    first and last pipeline stage both hold it and that gradients add up over them; `twin` marks the last stage's copy,
    which norms and checkpoints pass over.
    """

    name: str
    parameter: nn.Parameter
    axis: int = 0
    start: int = 0
    length: int | None = None
    shard: int | None = None
    partial: bool = False
    linear: nn.Module | None = None  # the layer that multiplies its input by the leaf ...
    meets: int = 1  # ... along this axis ...
    scattered: bool = False  # ... of which each tensor-parallel rank sees a part of the tokens
    tied: bool = False
    twin: bool = False

    def of(self, stored: Tensor) -> Tensor:
        """The leaf's part of a tensor that is laid out like the stored parameter."""
        return stored if self.whole else stored.narrow(self.axis, self.start, self.length or 0)

    @property
    def value(self) -> Tensor:
        """The leaf's local values: a view."""
        return self.of(self.parameter.data)

    @property
    def whole(self) -> bool:
        """Whether the stored parameter holds this leaf alone."""
        return self.length is None or self.length == self.parameter.shape[self.axis]

    def base(self, tensor_rank: int) -> tuple[int, ...]:
        """Where a tensor-parallel rank's part begins in the whole."""
        return tuple(tensor_rank * n if axis == self.shard else 0 for axis, n in enumerate(self.value.shape))

    def shape(self, tensor_ranks: int) -> tuple[int, ...]:
        """Global shape over `tensor_ranks` ranks."""
        return tuple(n * tensor_ranks if axis == self.shard else n for axis, n in enumerate(self.value.shape))


def prefixed(prefix: str, leaves: Iterator[Leaf]) -> Iterator[Leaf]:
    """The same leaves under a longer name."""
    for leaf in leaves:
        yield replace(leaf, name=f"{prefix}.{leaf.name}")
