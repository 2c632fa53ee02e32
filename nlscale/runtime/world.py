"""Joining the world: which rank this process is, the groups it belongs to, its device."""

import os
import random
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from nlscale.config.cluster import Cluster
from nlscale.config.errors import UserError, divisors
from nlscale.config.parallel import Parallel
from nlscale.runtime.absent import absent, uncompiled

with absent("wandb"), uncompiled():  # the first of megatron-core that is imported, where a run's loop is
    from megatron.core import jit, parallel_state

    jit.disable_jit_fuser()  # for what is imported of it later

from nlscale.runtime import cpu
from nlscale.runtime.muster import meet, prove

ORDER = "tp-cp-ep-pp-dp"  # ranks of one replica are neighbours: they read the same rows (StreamingDataset replication)


@dataclass(frozen=True)
class World:
    """This process among all ranks. A value that is passed, never asked for."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    replica: int  # which rows this rank reads ...
    replicas: int  # ... of so many shares
    copy: int  # which copy of its shard of the model this rank holds ...
    copies: int  # ... of so many: one a replica and context-parallel rank
    tensor_rank: int
    pipeline_rank: int
    context_rank: int  # which part of each row's tokens
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup  # the ranks that share a row's tokens
    data: dist.ProcessGroup  # all copies of this rank's shard
    near: dist.ProcessGroup  # the copies on this node
    far: dist.ProcessGroup  # one copy a node, those at this one's place in their nodes
    # (both are `data` where nothing asks for nodes)
    ends: dist.ProcessGroup | None  # first and last pipeline stage of a replica; None between them

    @property
    def words(self) -> str:
        """Such as `2 ranks, 1 replica, cpu`."""
        counts = (f"{n} {what}{'s' * (n > 1)}" for n, what in ((self.size, "rank"), (self.replicas, "replica")))
        return ", ".join([*counts, self.device.type])

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.pipeline.size() - 1

    @property
    def counts(self) -> bool:
        """Whether this rank speaks for its replica's rows."""
        return self.tensor_rank == self.pipeline_rank == self.context_rank == 0


def ranks_from_environment() -> tuple[int, int, int, int] | None:
    """(rank, size, local rank, local size) as torchrun or srun set them; None where neither started this process."""
    env = os.environ
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ):
        if all(name in env for name in names[:3]):
            rank, size, local = (int(env[name]) for name in names[:3])
            return rank, size, local, int(re.match(r"\d+", env.get(names[3], str(size)))[0])  # type: ignore[index]  # Slurm writes 2(x3),1
    return None


def announce(rank: int, size: int, local_rank: int, local_size: int) -> None:
    """Writes the rank where torch, streaming and DeepSpeed look for it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ.update(LOCAL_WORLD_SIZE=str(local_size))
    if size > local_size and "MASTER_ADDR" not in os.environ:
        raise UserError("several nodes: set MASTER_ADDR to the host of rank 0 in the job script")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        job = int(os.environ.get("SLURM_JOB_ID", "0"))
        os.environ["MASTER_PORT"] = str(20000 + job % 12000)


def join(parallel: Parallel, cluster: Cluster, seed: int, node: int | None = None) -> World:
    """Joins the process group and makes megatron-core's groups.

    The rank comes from torchrun's or srun's environment; alone, a process is a world of one. `node`: replicas of a
    node; None: as many as this machine's ranks hold; 0: nothing asks for nodes, and no groups are made for them.
    """
    rank, size, local_rank, local_size = ranks_from_environment() or (0, 1, 0, 1)
    announce(rank, size, local_rank, local_size)
    if size % parallel.ranks:
        raise UserError(f"{size} ranks are no multiple of the {parallel.ranks} that one replica needs")
    cpu.install()
    device = take_device(cluster, local_rank, local_size)
    if not dist.is_initialized():
        timeout = timedelta(seconds=cluster.timeout)
        store = meet(rank, size, cluster.gather, timeout)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        prove(rank, size, device)
    return arranged(parallel, Place(rank, size, local_rank, local_size, device), seed, cluster.timeout, node)


class Place(NamedTuple):
    """Where a process stands."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


def arranged(parallel: Parallel, place: Place, seed: int, timeout: int, node: int | None) -> World:
    """megatron-core's groups, and ours across nodes, over the ranks of the default process group. A collective."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_tensor_parallel_size=parallel.tensor * parallel.context,  # no experts; it wants their sizes to fit ORDER
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        order=ORDER,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, -(-timeout // 60)),
    )
    random.seed(seed)
    torch.manual_seed(seed)
    seconds = timedelta(seconds=timeout)
    near = far = data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if node != 0:
        near, far = nodes(
            place.size // parallel.ranks, parallel, node or max(1, place.local_size // parallel.ranks), seconds
        )
    return World(
        rank=place.rank,
        size=place.size,
        local_rank=place.local_rank,
        device=place.device,
        replica=parallel_state.get_data_parallel_rank(),
        replicas=parallel_state.get_data_parallel_world_size(),
        copy=dist.get_rank(data),
        copies=data.size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=data,
        near=near,
        far=far,
        ends=parallel_state.get_embedding_group(check_initialized=False),
    )


def take_device(cluster: Cluster, local_rank: int, local_size: int) -> torch.device:
    """This rank's GPU, or its share of the cores."""
    if not torch.cuda.is_available():
        torch.set_flush_denormal(True)  # or shares that fade to nothing make a product twenty times slower
        torch.set_num_threads(cluster.threads or max(1, (os.cpu_count() or 1) // local_size))
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the device
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")  # collectives, for the watchdog's record
    return device


def nodes(
    replicas: int, parallel: Parallel, node: int, timeout: timedelta
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's groups inside and across nodes of `node` replicas (ORDER says which rank holds what)."""
    if replicas % node:
        raise UserError(
            f"optim.node={node} replicas a node do not divide {replicas} replicas; "
            f"optim.node in {divisors(replicas)} would work"
        )
    mine: dict[str, dist.ProcessGroup] = {}

    def make(name: str, members: list[int]) -> None:
        group = dist.new_group(members, timeout=timeout)
        mine.update({name: group} if dist.get_rank() in members else {})

    inside, size = parallel.tensor * parallel.context, node * parallel.context
    for shard in (t + inside * p for p in range(parallel.pipeline) for t in range(parallel.tensor)):
        first = [shard + parallel.ranks * replica for replica in range(replicas)]
        copies = [rank + parallel.tensor * c for rank in first for c in range(parallel.context)]
        for start in range(0, len(copies), size):
            make("near", copies[start : start + size])
        for place in range(size):
            make("far", copies[place::size])
    return mine["near"], mine["far"]


def leave() -> None:
    """Ends the groups that `join` made."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
