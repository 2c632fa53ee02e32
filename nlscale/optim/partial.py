"""Windows that hold a part of a gradient: summed over the ranks that hold the other parts, at the boundary only.

Sums are linear, so nothing is lost by waiting. Gains under sequence parallelism, and gains of levels under tensor
parallelism, are partial over tensor-parallel ranks; a tied embedding is partial over the first and last pipeline stage.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from nlscale.optim.window import Windows
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World


def sum_partials(windows: Windows, leaves: Sequence[Leaf], world: World) -> None:
    """Makes the windows of these leaves whole on every rank. A collective where any of them is partial."""
    sum_over([windows.of(leaf) for leaf in leaves if leaf.partial], world.tensor)
    sum_over([windows.of(leaf) for leaf in leaves if leaf.tied], world.ends)


def sum_over(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """One all-reduce of all tensors together."""
    if tensors and group is not None and group.size() > 1:
        flat = _flatten_dense_tensors(tensors)
        dist.all_reduce(flat, group=group)
        torch._foreach_copy_(list(tensors), list(_unflatten_dense_tensors(flat, tensors)))
