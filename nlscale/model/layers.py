"""megatron-core's configuration for our blocks, and the norm that its local layers lack."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.model import Model
from nlscale.config.parallel import Parallel
from nlscale.runtime.leaf import Leaf


def transformer_config(model: Model, parallel: Parallel, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    """What megatron-core's layers and schedules need to know. Weights are left unset: model/init.py fills them."""
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.width,
        num_attention_heads=model.heads,
        num_query_groups=model.key_value_heads,
        ffn_hidden_size=model.feed_forward,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type != "cuda",
        perform_initialization=False,
        calculate_per_token_loss=True,  # the loss is a sum over tokens: a level's window divides by its own count
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        # Interleaving between two stages with batched sends mismatches messages (megatron-core's own launcher forbids
        # it), so interleaved stages send one by one; gloo may still read an output that deallocation would free.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=device.type != "cpu" or not interleaved,
    )


class Down(RowParallelLinear):
    """A row-parallel projection whose weight is stored (inputs, outputs): a slice of its inputs is contiguous memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        outputs_by_inputs: nn.Parameter = self._parameters["weight"]
        self.weight = nn.Parameter(torch.empty_like(outputs_by_inputs.t(), memory_format=torch.contiguous_format))
        self._forward_impl = product

    def leaf(self, name: str, start: int, length: int) -> Leaf:
        """Inputs start ... of the weight."""
        return Leaf(name, self.weight, start=start, length=length, shard=0, linear=self, meets=0)


def product(input: Tensor, weight: Tensor, **_: object) -> Tensor:
    """(T, B, inputs) -> (T, B, outputs); megatron-core's layer does the communication around it."""
    return torch.matmul(input, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times the gains, over the last axis."""
    return F.rms_norm(x, weight.shape, weight, eps)


class Norm(nn.RMSNorm):
    """RMSNorm over the last axis (Zhang and Sennrich, 2019), also on activations split along the sequence."""

    def __init__(self, width: int, config: TransformerConfig) -> None:
        device = torch.cuda.current_device() if not config.use_cpu_initialization else None
        super().__init__(width, eps=config.layernorm_epsilon, dtype=config.params_dtype, device=device)
        self.partial = config.sequence_parallel
        self.normed: Callable[[Tensor, Tensor, float], Tensor] = rms_norm

    def forward(self, x_TBD: Tensor) -> Tensor:
        """(T, B, D) -> (T, B, D)."""
        return self.normed(x_TBD, self.weight, self.eps or 0.0)

    def leaves(self) -> Iterator[Leaf]:
        """The gain; with sequence parallelism each rank sees a part of the tokens, so its gradient is a partial sum."""
        yield Leaf("norm.weight", self.weight, partial=self.partial)
