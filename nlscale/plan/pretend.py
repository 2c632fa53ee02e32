"""A world of any size, pretended in one process: groups whose peers are not there, tensors that have no memory.

The model, its schedule and its optimizer are the real ones. Tensors are on torch's meta device, whatever device they are
asked for on; torch's fake backend takes part in collectives without waiting for anybody; whoever reads a number reads 1.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # registers what collectives give for meta tensors
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nlscale.config.run import Run
from nlscale.plan.ledger import Ledger
from nlscale.runtime import cpu
from nlscale.runtime.world import Place, World, arranged, leave

META = torch.device("meta")
MAKERS = {"empty", "zeros", "ones", "full", "arange", "scalar_tensor", "randint", "randn", "rand"}
UNKNOWN = (  # collectives whose outputs are arguments, and which torch has no form of for meta tensors
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def answered() -> Iterator[None]:
    """Meanwhile, what torch's Python does without dispatching, or decides by a tensor's device, is ours.

    A TorchFunctionMode would be asked at every touch of a tensor, which took a sixth of a plan's time.
    """
    attend, listed, made = F.scaled_dot_product_attention, Tensor.tolist, torch.tensor

    def attention(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return flash(q, *args, **kwargs) if q.is_meta else attend(q, *args, **kwargs)

    def numbers(tensor: Tensor) -> Any:
        return filled(tensor.shape) if tensor.is_meta else listed(tensor)

    def tensor(*args: Any, **kwargs: Any) -> Tensor:
        return made(*args, **{**kwargs, "device": kwargs.get("device") or META})

    with (
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(Tensor, "tolist", numbers),
        patch.object(torch, "tensor", tensor),
    ):
        yield


class Nowhere(TorchDispatchMode):
    """Makes tensors on the meta device wherever they are asked for; numbers that the host reads are 1.

    What an operation gives depends on the shapes and dtypes that it is given, and most of its time goes into finding that
    out: each is asked once (most of all the chunks of a memory's walk, thousands of equal operations a block).
    """

    def __init__(self, ledger: Ledger) -> None:
        """`ledger`: is told of every operation and of what it gave."""
        super().__init__()
        self.ledger = ledger
        self.seen: dict[Any, Any] = {}
        self.pure: dict[Any, bool] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.answer(function, args, kwargs)
        self.ledger.note(function, args, result)
        return result

    def answer(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives."""
        key = None if kwargs or not self.is_pure(function) else given(args)
        if key is None:
            return self.asked(function, args, kwargs)
        like = self.seen.get((function, key))
        if like is None:
            result = self.asked(function, args, kwargs)
            if lies_apart(result, args):
                self.seen[function, key] = form(result)
            else:
                self.pure[function] = False
            return result
        return remade(like)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: torch need not wrap each dispatch against it."""
        return False

    def is_pure(self, function: Any) -> bool:
        """Whether an operation gives new tensors and changes nothing."""
        if function not in self.pure:
            schema = function._schema
            values = (*schema.arguments, *schema.returns)
            new = bool(schema.returns) and all(str(each.type) in ("Tensor", "Tensor[]") for each in schema.returns)
            self.pure[function] = new and not any(each.alias_info for each in values)
        return self.pure[function]

    def asked(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What the operation itself says."""
        kwargs = dict(kwargs or {})
        if function is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if kwargs.get("device") is not None or function._schema.name.split("::")[1] in MAKERS:
            kwargs["device"] = META
            kwargs.pop("pin_memory", None)
        if function in UNKNOWN:
            return FakeWork().boxed()
        return function(*args, **kwargs)


def given(args: Any) -> Any:
    """All that the form of a pure operation's results can depend on; None where some of it is not known here."""
    key: list[Any] = []
    for each in args:
        kind = type(each)
        if isinstance(each, Tensor):
            if not each.is_meta:
                return None
            key.append((each.shape, each.stride(), each.dtype))
        elif kind in (list, tuple):
            inner = given(each)
            if inner is None:
                return None
            key.append((kind, inner))
        elif each is None or kind in (int, float, bool, str, torch.dtype, torch.layout, torch.device):
            key.append((kind, each))  # 1, 1.0 and True are equal, and not the same
        else:
            return None
    return tuple(key)


def lies_apart(result: Any, args: Any) -> bool:
    """Whether all that an operation gave are tensors with memory of their own: some views are not marked as such."""
    found = result if isinstance(result, tuple | list) else [result]
    if not all(isinstance(each, Tensor) for each in found):
        return False
    places = [each.untyped_storage()._cdata for each in found]
    taken = {each.untyped_storage()._cdata for each in tree_leaves(args) if isinstance(each, Tensor)}
    return len({*places}) == len(places) and not taken & {*places}


def form(result: Any) -> Any:
    """Shape, strides and dtype of the tensor that an operation gave, or a list of those of each."""
    if isinstance(result, Tensor):
        return result.shape, result.stride(), result.dtype
    return [form(each) for each in result]


def remade(like: Any) -> Any:
    """New tensors of a form."""
    if isinstance(like, list):
        return tuple(remade(each) for each in like)
    return torch.empty_strided(like[0], like[1], dtype=like[2], device=META)


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
def pretended(run: Run, size: int, pipeline_rank: int, node: int | None, ledger: Ledger) -> Iterator[World]:
    """The world of `size` ranks as the first replica's first rank of a pipeline stage sees it.

    `node`: replicas of a node, as `join` takes it; `ledger` hears of all that is done there. Raises RuntimeError in a
    process that has joined a world already.
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
        with Nowhere(ledger), answered():
            place = Place(rank, size, 0, run.cluster.ranks, META)
            yield arranged(run.parallel, place, run.train.seed, run.cluster.timeout, node)
    finally:
        leave()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
