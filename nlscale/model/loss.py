"""Cross entropy over a vocabulary that is split over ranks, without ever holding all logits.

The gradient of a chunk of tokens is taken as soon as its logits exist, so at most `CHUNK` logits live at once and the
head is computed once. N tokens, D width, V this rank's share of the vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nlscale.model.layers import Norm
from nlscale.runtime.leaf import Leaf

CHUNK = 2**24  # logits held at once
IGNORE = -1  # a target that counts for nothing

CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def local_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Loss of each token (N,) where one rank holds the whole vocabulary."""
    return F.cross_entropy(logits_NV, targets_N, reduction="none", ignore_index=IGNORE)


def parallel_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Loss of each token (N,) where the vocabulary is split over tensor-parallel ranks."""
    return vocab_parallel_cross_entropy(logits_NV, targets_N) * (targets_N != IGNORE)


class SummedLoss(torch.autograd.Function):
    """Sum of token losses; the gradients are taken chunk by chunk in forward and handed out in backward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cross_entropy: CrossEntropy) -> Tensor:
        learn = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.promote_types(x_ND.dtype, torch.float32), device=x_ND.device)
        x_grads, weight_grad = [], None
        step = max(1, CHUNK // weight_VD.shape[0])
        for x, targets in zip(x_ND.split(step), targets_N.split(step), strict=True):
            with torch.set_grad_enabled(learn):
                x = x.detach().requires_grad_(learn)
                weight = weight_VD.detach().requires_grad_(learn)
                logits_NV = F.linear(x, weight)
                loss = cross_entropy(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), targets).sum()
            if learn:
                x_grad, part = torch.autograd.grad(loss, (x, weight))
                x_grads.append(x_grad)
                weight_grad = part if weight_grad is None else weight_grad.add_(part)
            total += loss.detach()
        if learn:
            ctx.save_for_backward(x_grads[0] if len(x_grads) == 1 else torch.cat(x_grads), weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad.to(x_grad.dtype), weight_grad * grad.to(weight_grad.dtype), None, None


class Head(MegatronModule):
    """Final norm, projection to the vocabulary and its loss."""

    def __init__(self, vocabulary: int, config: TransformerConfig) -> None:
        super().__init__(config)
        self.norm = Norm(config.hidden_size, config)
        self.project = ColumnParallelLinear(
            config.hidden_size, vocabulary, config=config, init_method=config.init_method, bias=False
        )
        split = config.tensor_model_parallel_size > 1
        self.cross_entropy = parallel_cross_entropy if split else local_cross_entropy
        self.enter = gather_from_sequence_parallel_region if config.sequence_parallel else copy_to_tensor_model_parallel_region

    def forward(self, x_TBD: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum of the losses of all targets that are not IGNORE: a float32 scalar, equal on all tensor-parallel ranks."""
        x_ND = self.enter(self.norm(x_TBD)).flatten(0, 1)
        return SummedLoss.apply(x_ND, self.project.weight, targets_BT.t().flatten(), self.cross_entropy)

    def logits(self, x_TBD: Tensor) -> Tensor:
        """(T, B, D) -> this rank's logits (T, B, V)."""
        return self.project(self.norm(x_TBD))[0]

    def leaves(self) -> Iterator[Leaf]:
        """norm and head."""
        yield from self.norm.leaves()
        yield Leaf("head.weight", self.project.weight, shard=0)
