"""ZeRO-1 a level: one DeepSpeed engine cuts a group's flats over replicas and reduces its windows to the owners.

The engine never sees a forward or backward pass and is not called between a level's boundaries, so a level that is not
due costs no collective and no optimizer work. It holds flat parameters that are no leaves of autograd; a stored
parameter that is one leaf moves into that memory, a leaf that shares its storage with other levels (slices of a
feed-forward) is copied back after a gather.
"""

import logging
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from nlscale.config.levels import Level
from nlscale.config.optim import Optim
from nlscale.optim.layout import Flat, flats
from nlscale.optim.matrices import Part
from nlscale.optim.partial import sum_partials
from nlscale.optim.rules import bind
from nlscale.optim.shard import parts
from nlscale.optim.window import Windows, window_dtype
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World

BUCKET = 2**26  # elements that one reduction carries at most


class Megatron:
    """megatron-core's groups in the words that DeepSpeed asks with: "model parallel" is tensor x pipeline."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        """Rank in tensor x pipeline."""
        return dist.get_rank(parallel_state.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Size of tensor x pipeline."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())


class ZeroShard:
    """A group's leaves behind one DeepSpeed engine (optim/shard.py has the seam)."""

    def __init__(
        self, level: Level, leaves: Sequence[Leaf], optim: Optim, windows: Windows, world: World, nested: bool
    ):
        self.level, self.windows, self.world = level, windows, world
        self.flats = flats(leaves, level.optimizer or optim.name, nested, world.replicas)
        self.leaves = [leaf for flat in self.flats for leaf, _ in flat.places]
        self.parameters = [flat_parameter(flat) for flat in self.flats]
        self.zero = engine(self.parameters, max(flat.elements for flat in self.flats))
        self.flat_weights = [
            flat[: f.elements] for flat, f in zip(self.zero.bit16_groups_flat, self.flats, strict=True)
        ]
        self._attach()
        host = bool(optim.offload) and level.period >= optim.offload
        self.rules = []
        for flat, given in zip(self.flats, self.zero.parallel_partitioned_bit16_groups, strict=True):
            own = given[world.replica].detach()
            master = own.to(window_dtype(own.dtype), copy=True)
            master = on_host(master) if host else master
            matrices = [
                Part(span.start, (leaf.value.shape[0], leaf.value.shape[1]), leaf.shard)
                for leaf, _, span in parts(flat, world.replica, world.replicas)
                if leaf.value.ndim == 2
            ]
            self.rules.append(bind(flat.kind, master, optim, level, matrices, world.tensor))
        self.zero.single_partition_of_fp32_groups = [rule.master for rule in self.rules]
        self.arriving: list[dist.Work] = []
        elements, size = sum(flat.elements for flat in self.flats), self.parameters[0].element_size()
        self.bytes_a_reduce = self.bytes_a_gather = elements * size * (world.replicas - 1) // world.replicas

    def _attach(self) -> None:
        """Moves whole parameters into the engine's memory; keeps the views that every gather goes through."""
        self.stored, self.moved = [], []
        for flat, weights in zip(self.flats, self.flat_weights, strict=True):
            for (leaf, _), view in zip(flat.places, flat.views(weights), strict=True):
                if leaf.whole:
                    leaf.parameter.data = view
                else:
                    self.stored.append(leaf.value)
                    self.moved.append(view)

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

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], rate: float) -> None:
        """Applies each flat's rule to this rank's part of its mean gradient."""
        for rule, grad in zip(self.rules, grads, strict=True):
            rule.step(grad.to(rule.master.device), rate)

    @torch.no_grad()
    def gather(self) -> None:
        """Begins to send this rank's part of the weights to every replica."""
        for i, (rule, weights) in enumerate(zip(self.rules, self.flat_weights, strict=True)):
            part = self.zero.parallel_partitioned_bit16_groups[i][self.world.replica]
            part.copy_(rule.master, non_blocking=True)
            self.arriving.append(dist.all_gather_into_tensor(weights, part, group=self.world.data, async_op=True))

    @torch.no_grad()
    def arrive(self) -> None:
        """Waits for `gather`, and copies slices to where the model computes with them."""
        if self.arriving:
            for work in self.arriving:
                work.wait()
            self.arriving = []
            if self.stored:
                torch._foreach_copy_(self.stored, self.moved)


def on_host(master: Tensor) -> Tensor:
    """A copy in host memory; pinned where there is a device to copy from."""
    copy = torch.empty_like(master, device="cpu", pin_memory=master.is_cuda)
    return copy.copy_(master)


def flat_parameter(flat: Flat) -> nn.Parameter:
    """One parameter that holds the leaves where the flat places them."""
    first = flat.places[0][0].value
    values = torch.zeros(flat.elements, dtype=first.dtype, device=first.device)
    flat.fill(values, [leaf.value for leaf, _ in flat.places])
    return nn.Parameter(values)


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


def forbid_compilation() -> None:
    """Keeps DeepSpeed from compiling operators at start-up.

    The one that it would build on a CPU serves inference only, takes minutes, and a build that is killed leaves a lock
    on which every later run waits.
    """
    deepspeed.ops.__compatible_ops__ = {}


def silence() -> None:
    """What an engine says of itself at start-up is of no use to a run's reader."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
