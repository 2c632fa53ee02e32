"""ZeRO-1 a level: one DeepSpeed engine cuts a group's flats over replicas and reduces its windows to the owners.

The engine never sees a forward or backward pass and is not called between a level's boundaries, so a level that is not
due costs no collective and no optimizer work.
"""

import contextlib
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from nlscale.config.levels import Level
from nlscale.config.run import Run
from nlscale.optim.flat_shard import FlatShard, flat_parameter, flats_of
from nlscale.optim.layout import ALIGN
from nlscale.optim.partial import sum_partials
from nlscale.optim.window import Windows, window_dtype
from nlscale.runtime.absent import uncompiled
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World

# Else DeepSpeed compiles operators at start-up. The one that it would build on a CPU serves inference only, takes minutes,
# and a build that is killed leaves a lock on which every later run waits.
deepspeed.ops.__compatible_ops__ = {}
deepspeed.utils.logger.setLevel(logging.ERROR)  # what an engine says of itself is of no use to a run's reader

# An engine imports these as it is made, torch's optimizers their compiler; here, ranks that are forked find them imported.
for late in (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
):
    with contextlib.suppress(ImportError), uncompiled():
        importlib.import_module(late)
importlib.import_module("torch._dynamo")

BUCKET = 2**26  # elements that an engine stages at once; a longer flat is reduced from where it lies


class Megatron:
    """megatron-core's groups in the words that DeepSpeed asks with: "model parallel" is tensor x pipeline."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """All copies of this rank's shard: replicas x context."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        """Rank among them."""
        return dist.get_rank(self.get_data_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        """How many there are."""
        return self.get_data_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        """Rank in tensor x pipeline."""
        return dist.get_rank(parallel_state.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Size of tensor x pipeline."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())


class ZeroShard(FlatShard):
    """A group's leaves behind one DeepSpeed engine."""

    def __init__(self, level: Level, leaves: Sequence[Leaf], run: Run, windows: Windows, world: World) -> None:
        given = flats_of(level, leaves, run, world, ALIGN)
        self.parameters = [flat_parameter(flat) for flat in given]
        self.zero = engine(self.parameters, max(flat.elements for flat in given))
        super().__init__(level, given, self.zero.bit16_groups_flat, run.optim, windows, world)
        hand_over(self.zero, self.parameters, [rule.master for rule in self.rules])
        self.bytes_a_reduce = self.bytes_a_gather = self.ring_bytes(self.parameters[0].element_size())

    @torch.no_grad()
    def total(self) -> list[Tensor]:
        """This rank's part of the windows' sum over all replicas, one float32 tensor a flat; the windows are zero after."""
        sum_partials(self.windows, self.leaves, self.world)
        for flat, parameter in zip(self.flats, self.parameters, strict=True):
            values = [self.windows.of(leaf) for leaf, _ in flat.places]
            parameter.grad = torch.zeros_like(parameter)
            flat.fill(parameter.grad, values)
            torch._foreach_zero_(values)
        self.zero.setup_buckets()
        self.zero.reduce_gradients()
        grads = [torch.cat([g.view(-1) for g in self.zero.averaged_gradients[i]]) for i in range(len(self.flats))]
        for i in range(len(self.flats)):
            self.zero.averaged_gradients[i] = self.zero.all_grad_tensors[i] = None
        return [grad.to(window_dtype(grad.dtype)) for grad in grads]


def hand_over(zero: Any, parameters: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> None:
    """Puts the rules' masters in the place of the engine's own float32 copy of this rank's part, which is freed."""
    for group, master in zip(zero.optimizer.param_groups, masters, strict=True):
        group["params"] = [master]
    for parameter in parameters:
        parameter._hp_mapping = None  # type: ignore[attr-defined]
    zero.single_partition_of_fp32_groups = list(masters)
    zero.optimizer.state.clear()


def engine(parameters: Sequence[nn.Parameter], elements: int) -> Any:
    """DeepSpeed's ZeRO-1 optimizer over these parameters; its own optimizer is never asked to step."""
    idle = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=0.0)
    config = engine_config(parameters[0].dtype, min(elements, BUCKET))
    initialised, *_ = deepspeed.initialize(
        model=nn.ParameterList(parameters), optimizer=idle, config=config, mpu=Megatron()
    )
    zero = initialised.optimizer
    zero.gradient_average = False  # windows are divided by their tokens, not by replicas
    if parameters[0].dtype == torch.float64:  # a reference's precision, which DeepSpeed's configuration cannot name
        zero.communication_data_type = zero.gradient_accumulation_dtype = torch.float64
        zero.use_separate_grad_accum = zero.use_grad_accum_attribute = False
        zero.ipg_buckets = {torch.float64: zero.ipg_buckets.pop(torch.float32)}
    return zero


def engine_config(dtype: torch.dtype, bucket: int) -> dict[str, Any]:
    """ZeRO-1 that reduces each gradient to its shard's owner and only when asked."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": False,
            "use_multi_rank_bucket_allreduce": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
        },
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "bf16"}
        config["communication_data_type"] = "bf16"
    return config
