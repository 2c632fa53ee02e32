"""Bytes on the wire: every collective that a rank takes part in, counted as torch dispatches it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Wire(TorchDispatchMode):
    """Bytes that this rank sends on a ring, of every collective in the groups given.

    An all-reduce of S bytes over N ranks sends 2 (N-1)/N S, a reduce, reduce-scatter or all-gather (N-1)/N S.
    """

    def __init__(self, *groups: dist.ProcessGroup) -> None:
        super().__init__()
        self.names, self.sent = {group.group_name for group in groups}, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            (group,) = (dist.ProcessGroup.unbox(a) for a in args if is_group(a))
            if group.group_name in self.names:
                payload = max(t.numel() * t.element_size() for a in args for t in tensors(a))
                share = (group.size() - 1) / group.size() * payload
                self.sent += 2 * share if "allreduce" in function._schema.name else share
        return function(*args, **(kwargs or {}))


def is_group(argument: object) -> bool:
    """Whether an argument of a dispatched collective is its group."""
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())


def tensors(argument: object) -> list[Tensor]:
    """The tensors of an argument, however deep in lists."""
    if isinstance(argument, Tensor):
        return [argument]
    return [t for part in argument for t in tensors(part)] if isinstance(argument, list | tuple) else []
