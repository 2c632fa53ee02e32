"""The second sharder: megatron-core's gradient buffers, reduced behind backward by a real reduce-scatter.

It serves the level that moves every step, where a reduction can hide: each flat is one bucket of a buffer, whose float32
memory is the window itself. When the last micro-batch has added to every leaf of a flat, its reduce-scatter starts, while
backward goes on with the blocks before. (Leaves whose gradients are partial sums wait for the step's end.) Weights come back
as in the other sharder, not by megatron-core's gather: that is a coalesced one, and two of those in flight on gloo corrupt
the heap (torch 2.13; 5 of 20 runs of a loop of nothing else, none of 20 of coalesced reduce-scatters).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.levels import Level
from nlscale.config.run import Run
from nlscale.optim.flat_shard import FlatShard, flat_parameter, flats_of
from nlscale.optim.partial import sum_partials
from nlscale.optim.window import Windows
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World

ALIGN = 128  # megatron-core pads a bucket to multiples of lcm(replicas, 128)


class BufferShard(FlatShard):
    """A group's leaves in megatron-core's buffers."""

    def __init__(self, level: Level, leaves: Sequence[Leaf], run: Run, windows: Windows, world: World) -> None:
        given = flats_of(level, leaves, run, world, ALIGN)
        self.buckets = [bucket_of(flat_parameter(flat), run) for flat in given]
        memory = [group.buckets[0].param_data for group in self.buckets]
        super().__init__(level, given, memory, run.optim, windows, world)
        self.sums = [group.buckets[0].grad_data for group in self.buckets]
        self.bytes_a_reduce = self.ring_bytes(self.sums[0].element_size())
        self.bytes_a_gather = self.ring_bytes(self.weights[0].element_size())
        self.micro_batches = run.train.global_batch // (run.train.micro_batch * world.replicas)
        self.started = [False] * len(given)
        self.missing = [0] * len(given)  # leaves of each flat that the step's last micro-batch has not reached yet
        self.seen: Counter[nn.Parameter] = Counter()
        self.flat_of: dict[nn.Parameter, list[int]] = {}
        self._adopt()
        self.restart()

    def _adopt(self) -> None:
        """Lets backward add into the buffers, and tells them when a parameter has its step's gradient."""
        for i, (flat, sums) in enumerate(zip(self.flats, self.sums, strict=True)):
            for (leaf, _), view in zip(flat.places, flat.views(sums), strict=True):
                if leaf.whole:
                    self.windows.adopt(leaf.parameter, view)
                self.flat_of.setdefault(leaf.parameter, []).append(i)
        for parameter in self.flat_of:
            parameter.register_post_accumulate_grad_hook(self.added)

    def restart(self) -> None:
        """Begins a step."""
        self.seen.clear()
        self.started = [False] * len(self.flats)
        self.missing = [len(flat.places) for flat in self.flats]

    def added(self, parameter: nn.Parameter) -> None:
        """A micro-batch has added to a parameter; after the last one its flat may travel."""
        self.seen[parameter] += 1
        if self.seen[parameter] == self.micro_batches:
            for i in self.flat_of[parameter]:
                self.missing[i] -= 1
                waits = any(leaf.partial or leaf.tied for leaf, _ in self.flats[i].places)
                if not self.missing[i] and not waits:
                    self.start(i)

    @torch.no_grad()
    def start(self, i: int) -> None:
        """Begins to reduce a flat."""
        flat, sums = self.flats[i], self.sums[i]
        for (leaf, _), view in zip(flat.places, flat.views(sums), strict=True):
            if not leaf.whole:
                view.copy_(self.windows.of(leaf))
                self.windows.of(leaf).zero_()
        self.buckets[i].start_grad_sync()
        self.started[i] = True

    @torch.no_grad()
    def total(self) -> list[Tensor]:
        """This rank's part of the windows' sum over all replicas, one float32 tensor a flat; the windows are zero after."""
        waiting = [i for i, started in enumerate(self.started) if not started]
        sum_partials(self.windows, [leaf for i in waiting for leaf, _ in self.flats[i].places], self.world)
        for i in waiting:
            self.start(i)
        grads = []
        for group, sums in zip(self.buckets, self.sums, strict=True):
            group.finish_grad_sync()
            grads.append(sums.chunk(self.world.copies)[self.world.copy].clone())
            sums.zero_()
        self.restart()
        return grads


def bucket_of(parameter: nn.Parameter, run: Run) -> Any:
    """megatron-core's buffer for one flat parameter: one bucket, sharded, reduced in float32."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=run.model.width,
        num_attention_heads=run.model.heads,
        calculate_per_token_loss=True,  # sums, not means
        params_dtype=parameter.dtype,
        bf16=parameter.dtype == torch.bfloat16,
        use_cpu_initialization=not parameter.is_cuda,
    )
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,
    )
    box = DistributedDataParallel(config, reduction, nn.ParameterList([parameter]), disable_bucketing=True)
    (group,) = box.bucket_groups
    group.is_first_batch = False  # it would learn by watching when its parameters are ready; we say so
    return group
