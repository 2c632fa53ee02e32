"""ZeRO a level: one DeepSpeed engine per level shards its master weights and moments over replicas.

The engine never sees a forward or backward pass. At a level's boundary it is handed the mean of the level's window; its
step reduces that mean to the owners of the shards, clips, updates and gathers. Between boundaries it is not called, so a
level that is not due costs no collective and no optimizer work.

The engine flattens its parameters into memory of its own. A stored parameter that is one leaf moves there; a leaf that
shares its storage with other levels (feed-forward slices) is copied back after a move.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from nlscale.config.model import Level
from nlscale.config.optim import Optim
from nlscale.optim.levels import decays
from nlscale.optim.window import Windows
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World

BUCKET = 2**26  # elements a reduction carries at most


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


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one leaf's local elements that this rank's shard owns."""

    leaf: Leaf
    start: int  # in the leaf's local elements, row-major
    values: dict[str, Tensor]  # "weight", "exp_avg", "exp_avg_sq": flat views of the shard


@dataclass(frozen=True)
class Moved:
    """What a level's move did. A window with a gradient that is not finite is dropped on all ranks alike."""

    grad_norm: Tensor
    skipped: bool
    update_square: Tensor  # squared norm of this rank's part of the weight change


class LevelShard:
    """One level's engine: `move` takes the level's window to new weights."""

    def __init__(self, level: Level, leaves: Sequence[Leaf], optim: Optim, windows: Windows, world: World) -> None:
        if not leaves:
            raise ValueError(f"rank {world.rank} holds nothing of level {level.name}")
        self.level, self.windows, self.world = level, windows, world
        self.groups = optimizer_groups(leaves)
        self.leaves = [leaf for group in self.groups for leaf in group]
        runs = [[list(run) for _, run in groupby(group, key=is_split)] for group in self.groups]
        self.flats = [(flat_parameter(run), run) for group in runs for run in group]
        dtype = self.flats[0][0].dtype
        self.elements = sum(flat.numel() for flat, _ in self.flats)
        self.element_bytes = self.flats[0][0].element_size()
        box = nn.ParameterList([flat for flat, _ in self.flats])
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [flat for flat, run in self.flats if run[0] in group],
                    "weight_decay": optim.weight_decay if decays(group[0].name) else 0.0,
                }
                for group in self.groups
            ],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        config = engine_config(optim.clip, dtype, min(self.elements, BUCKET))
        self.engine, *_ = deepspeed.initialize(model=box, optimizer=optimizer, config=config, mpu=Megatron())
        self.zero = self.engine.optimizer
        for group in self.zero.optimizer.param_groups:
            (shard,) = group["params"]
            self.zero.optimizer.state[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                "exp_avg": torch.zeros_like(shard),
                "exp_avg_sq": torch.zeros_like(shard),
            }
        self._attach()

    def _attach(self) -> None:
        """Moves whole parameters into the engine's memory; keeps the views that every move goes through."""
        views = [view for flat, run in self.flats for view in split_like(flat.data, run)]
        for leaf, view in zip(self.leaves, views, strict=True):
            if leaf.whole:
                leaf.parameter.data = view
        shared = [(leaf.value, view) for leaf, view in zip(self.leaves, views, strict=True) if not leaf.whole]
        self.stored, self.moved = [pair[0] for pair in shared], [pair[1] for pair in shared]
        self.sums = [self.windows.of(leaf) for leaf in self.leaves]
        self.partial = [self.windows.of(leaf) for leaf in self.leaves if leaf.partial]

    @torch.no_grad()
    def move(self, rate: float) -> Moved:
        """Closes the window: mean over its tokens on all replicas, clip, AdamW on this rank's shard, gather.

        A collective over the level's ranks. Units: `rate` is the level's learning rate.
        """
        index = self.windows.levels.index(self.level.name)
        tokens = self.windows.tokens[index].clone()
        dist.all_reduce(tokens, group=self.world.data)
        self._sum_partials()
        # DeepSpeed averages over replicas; the mean of a window is the sum over replicas by the tokens of all of them.
        torch._foreach_mul_(self.sums, (self.world.replicas / tokens.clamp(min=1)).to(self.sums[0].dtype))
        means = iter(self.sums)
        for flat, run in self.flats:
            flat.grad = torch.cat([mean.reshape(-1) for mean in islice(means, len(run))]).to(flat.dtype)
        for group in self.zero.param_groups:
            group["lr"] = rate
        before = [shard.detach().clone() for shard in self.zero.single_partition_of_fp32_groups]
        self.zero.setup_buckets()
        self.engine.step()
        torch._foreach_zero_(self.sums)
        self.windows.restart(self.level.name)
        self.publish()
        norm = torch.as_tensor(self.engine.get_global_grad_norm())
        return Moved(norm, bool(self.zero.overflow), self._update_square(before))

    def publish(self) -> None:
        """Copies gathered weights into storage that several levels share."""
        if self.stored:
            torch._foreach_copy_(self.stored, self.moved)

    def gather(self) -> None:
        """Makes every rank's weights from the masters, after those were loaded."""
        self.zero.update_lp_params()
        self.publish()

    @property
    def updates(self) -> Tensor:
        """Number of moves so far (float32 scalar); setting it writes every group's counter."""
        return self.zero.optimizer.state[self.zero.single_partition_of_fp32_groups[0]]["step"]

    @updates.setter
    def updates(self, count: float) -> None:
        for shard in self.zero.single_partition_of_fp32_groups:
            self.zero.optimizer.state[shard]["step"].fill_(count)

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of each leaf: master weight and moments."""
        for group, shard, size in zip(
            self.groups, self.zero.single_partition_of_fp32_groups, self.zero.partition_size, strict=True
        ):
            first, state, offset = self.world.replica * size, self.zero.optimizer.state[shard], 0
            for leaf in group:
                count = leaf.value.numel()
                low, high = max(offset, first), min(offset + count, first + size)
                if low < high:
                    span = slice(low - first, high - first)
                    flat = {"weight": shard.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
                    yield Fragment(leaf, low - offset, {name: tensor[span] for name, tensor in flat.items()})
                offset += count

    @property
    def bytes_a_move(self) -> int:
        """Bytes this rank sends on a ring when the level moves: (N-1)/N of its gradients and of its weights."""
        padded = sum(int(size) for size in self.zero.partition_size) * self.world.replicas
        return 2 * (self.world.replicas - 1) * padded * self.element_bytes // self.world.replicas

    def _sum_partials(self) -> None:
        """Gains that see a part of the tokens (sequence parallelism): one sum over tensor-parallel ranks."""
        if self.partial:
            flat = _flatten_dense_tensors(self.partial)
            dist.all_reduce(flat, group=self.world.tensor)
            torch._foreach_copy_(self.partial, list(_unflatten_dense_tensors(flat, self.partial)))

    def _update_square(self, before: Sequence[Tensor]) -> Tensor:
        """Squared norm of the change of this rank's shard; replicated leaves count on tensor rank 0 only."""
        total = torch.zeros((), dtype=torch.float32, device=before[0].device)
        for group, old, new in zip(self.groups, before, self.zero.single_partition_of_fp32_groups, strict=True):
            counted = len(new)
            if self.world.tensor_rank:
                split = sum(leaf.value.numel() for leaf in group if leaf.shard is not None)
                counted = min(counted, max(0, split - self.world.replica * counted))
            total += (new.detach() - old)[:counted].square_().sum()
        return total


def optimizer_groups(leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    """Leaves with and without weight decay; in each, those that tensor parallelism splits come first."""
    groups = [[leaf for leaf in leaves if decays(leaf.name) == decay] for decay in (True, False)]
    return [sorted(group, key=is_split, reverse=True) for group in groups if group]


def is_split(leaf: Leaf) -> bool:
    """Whether tensor parallelism splits a leaf; norms count what it does not split once."""
    return leaf.shard is not None


def flat_parameter(run: Sequence[Leaf]) -> nn.Parameter:
    """The engine's own parameter for a run of leaves: few large ones cost few operations.

    It is no leaf of autograd, so no hook of the engine ever runs.
    """
    parameter = nn.Parameter(torch.cat([leaf.value.detach().reshape(-1) for leaf in run]))
    parameter.tensor_model_parallel = is_split(run[0])  # type: ignore[attr-defined]
    return parameter


def split_like(flat: Tensor, run: Sequence[Leaf]) -> list[Tensor]:
    """Views of `flat`, shaped like the leaves of its run."""
    parts = flat.split([leaf.value.numel() for leaf in run])
    return [part.view(leaf.value.shape) for part, leaf in zip(parts, run, strict=True)]


def engine_config(clip: float, dtype: torch.dtype, bucket: int) -> dict[str, Any]:
    """ZeRO-1 that reduces each gradient to its shard's owner and only when asked to step."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip,
        "steps_per_print": None,
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
    """A skipped step is reported by the run itself, once, with its level."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
