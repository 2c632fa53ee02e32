"""Sums over ranks that can be differentiated as often as one likes, and layers made of them.

megatron-core's are differentiable once: in a second derivative its sums over tensor-parallel ranks would silently be
missing. Levels that learn inside rows take gradients in their forward pass, and with `model.inner.meta=full` the outer
gradient follows those.

N tokens, V this rank's share of the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group, get_tensor_model_parallel_rank
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

Group = Any  # a process group, which this room only hands on
Product = Callable[[Tensor, Tensor], Tensor]


class Spread(torch.autograd.Function):
    """What all ranks of a group hold goes to each one's own work; backward, the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        """Unchanged."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *of: Any) -> Any:
        """The sum."""
        return Summed.apply(of[0], ctx.group), None


class Summed(torch.autograd.Function):
    """The sum of the ranks' own parts, which all hold; backward, their gradient to each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        """The sum, in memory of its own."""
        ctx.group = group
        own = x.clone(memory_format=torch.contiguous_format)
        return reduce_from_tensor_model_parallel_region(own, group)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *of: Any) -> Any:
        """To each."""
        return Spread.apply(of[0], ctx.group), None


def to_tensor_ranks(x: Tensor) -> Tensor:
    """What all tensor-parallel ranks work on; backward, the sum of their gradients."""
    group = get_tensor_model_parallel_group()
    return x if group.size() == 1 else Spread.apply(x, group)  # type: ignore[no-any-return]


def from_tensor_ranks(x: Tensor) -> Tensor:
    """The sum of what tensor-parallel ranks made; backward, its gradient to each."""
    group = get_tensor_model_parallel_group()
    return x if group.size() == 1 else Summed.apply(x, group)  # type: ignore[no-any-return]


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Loss of each token (N,) over a vocabulary that tensor-parallel ranks share, in the logits' dtype; 0 for a target
    below 0, which counts for nothing.
    """
    share, rank = logits_NV.shape[1], get_tensor_model_parallel_rank()
    place = targets_N - rank * share
    picked = logits_NV.gather(1, place.clamp(0, share - 1)[:, None]) * ((place >= 0) & (place < share))[:, None]
    mine = torch.arange(get_tensor_model_parallel_group().size(), device=place.device) == rank
    *whole, of_target = from_tensor_ranks(torch.cat([logits_NV.logsumexp(1, keepdim=True) * mine, picked], 1)).unbind(1)
    return (torch.stack(whole, 1).logsumexp(1) - of_target) * (targets_N >= 0)


def column(linear: ColumnParallelLinear, x: Tensor) -> tuple[Tensor, None]:
    """A layer whose outputs are split, without sequence parallelism."""
    return F.linear(to_tensor_ranks(x), linear.weight), None


def row(linear: RowParallelLinear, product: Product, x: Tensor) -> tuple[Tensor, None]:
    """A layer whose inputs are split, without sequence parallelism; `product`: of its inputs and its weight as stored."""
    return from_tensor_ranks(product(x, linear.weight)), None
