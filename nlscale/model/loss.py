"""Final norm, head and loss over a vocabulary that may be split over ranks.

N tokens, D width, V this rank's share of the vocabulary.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.summed_loss import CrossEntropy, summed_loss
from torch import Tensor, nn

from nlscale.model.collectives import to_tensor_ranks
from nlscale.model.layers import Norm

IGNORE = -1  # a target that counts for nothing


def local_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Loss of each token (N,) where one rank holds the whole vocabulary."""
    return F.cross_entropy(logits_NV, targets_N, reduction="none", ignore_index=IGNORE)


def parallel_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Loss of each token (N,) where the vocabulary is split over tensor-parallel ranks."""
    return vocab_parallel_cross_entropy(logits_NV, targets_N) * (targets_N != IGNORE)


class Head(MegatronModule):
    """Final norm, projection to the vocabulary and its loss."""

    def __init__(self, vocabulary: int, config: TransformerConfig, weight: nn.Parameter | None = None) -> None:
        """`weight`: this rank's rows (V, D) of an embedding that the head shares; None: the head has its own."""
        super().__init__(config)
        self.norm = Norm(config.hidden_size, config)
        options = {"config": config, "init_method": config.init_method, "bias": False}
        own = ColumnParallelLinear(config.hidden_size, vocabulary, **options).weight if weight is None else weight
        self.weight = own
        self.summed = summed_loss
        split = config.tensor_model_parallel_size > 1
        self.cross_entropy: CrossEntropy = parallel_cross_entropy if split else local_cross_entropy
        self.enter = gather_from_sequence_parallel_region if config.sequence_parallel else to_tensor_ranks

    def forward(self, x_TBD: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum of the losses of all targets that are not IGNORE: a float32 scalar, equal on all tensor-parallel ranks."""
        x_ND = self.enter(self.norm(x_TBD)).flatten(0, 1)
        return self.summed(x_ND, self.weight, targets_BT.t().flatten(), self.cross_entropy)

    def logits(self, x_TBD: Tensor) -> Tensor:
        """Scores of the whole vocabulary (T, B, V), in float32 at least, where each rank has all tokens; equal on all
        tensor-parallel ranks.
        """
        own = self.norm(x_TBD) @ self.weight.t()
        return gather_from_tensor_model_parallel_region(own.to(torch.promote_types(own.dtype, torch.float32)))
