"""A world of any size, pretended in one process: groups whose peers are not there, tensors that have no memory.

The model, its schedule and its optimizer are the real ones. Tensors are on torch's meta device, whatever device they are
asked for on; torch's fake backend takes part in collectives without waiting for anybody; whoever reads a number reads 1.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # registers what collectives give for meta tensors
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nlscale.config.run import Run
from nlscale.runtime import cpu
from nlscale.runtime.world import Place, World, arranged, leave

META = torch.device("meta")
MAKERS = {"empty", "zeros", "ones", "full", "arange", "scalar_tensor", "randint", "randn", "rand"}
UNKNOWN = (  # collectives whose outputs are arguments, and which torch has no form of for meta tensors
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Reads(TorchFunctionMode):
    """What torch's Python answers without dispatching, or decides by a tensor's device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist and args[0].is_meta:
            return filled(args[0].shape)
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            return flash(*args, **kwargs)
        return function(*args, **kwargs)


class Nowhere(TorchDispatchMode):
    """Makes tensors on the meta device wherever they are asked for; numbers that the host reads are 1."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if kwargs.get("device") is not None or function._schema.name.split("::")[1] in MAKERS:
            kwargs["device"] = META
            kwargs.pop("pin_memory", None)
        if function in UNKNOWN:
            return FakeWork().boxed()
        return function(*args, **kwargs)


def filled(shape: Sequence[int]) -> Any:
    """Ones in nested lists."""
    return [filled(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def flash(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **given: Any) -> Tensor:
    """Attention as the fused kernels keep it for backward: inputs, output and a number a query, no scores."""
    if given.get("enable_gqa"):
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    options = {"dropout_p": 0.0, "is_causal": bool(given.get("is_causal")), "attn_mask": attn_mask}
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)[0]
    return output


@contextmanager
def pretended(run: Run, size: int, pipeline_rank: int, node: int | None) -> Iterator[World]:
    """The world of `size` ranks as the first replica's first rank of a pipeline stage sees it.

    `node`: replicas of a node, as `join` takes it. Raises RuntimeError in a process that has joined a world already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has joined a world: a pretended one needs another process")
    rank = pipeline_rank * run.parallel.tensor * run.parallel.context
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # nobody connects to it
    cpu.install()
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with Nowhere(), META, Reads():
            place = Place(rank, size, 0, run.cluster.ranks, META)
            yield arranged(run.parallel, place, run.train.seed, run.cluster.timeout, node)
    finally:
        leave()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
