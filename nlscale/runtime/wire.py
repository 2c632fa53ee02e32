"""Bytes on the wire: every collective that a rank takes part in, counted as torch dispatches it.

What a rank sends on a ring of N: of an all-reduce of S bytes 2 (N-1)/N S; of a reduce, broadcast, reduce-scatter, all-gather
or all-to-all (N-1)/N S, S being the larger of what goes in and what comes out; of a message between two ranks S.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {  # torch's own words -> ours
    "allreduce_": "all-reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allgather_into_tensor_coalesced_": "all-gather",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "send": "send",
}


class Sent(NamedTuple):
    """One collective as this rank sees it."""

    group: str  # the group's name
    kind: str
    size: float  # bytes


class Axes(TorchDispatchMode):
    """Bytes that this rank sends, by the axis of the group and the kind of collective."""

    def __init__(self, axes: Mapping[str, str]) -> None:
        """`axes`: name of a group -> its axis; groups that are not named are one axis, `others`."""
        super().__init__()
        self.axes, self.bytes = axes, Counter[tuple[str, str]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(function, args)
        return function(*args, **(kwargs or {}))

    def note(self, function: Any, args: Any) -> None:
        """Counts an operation, if it is a collective."""
        found = sent(function, args)
        if found is not None and found.size:
            key = self.axes.get(found.group, "others"), found.kind
            self.bytes[key] += found.size  # type: ignore[assignment]


class Wire(Axes):
    """The same for some groups alone, in one number."""

    def __init__(self, *groups: dist.ProcessGroup) -> None:
        super().__init__({group.group_name: "these" for group in groups})

    @property
    def sent(self) -> float:
        """Bytes so far."""
        return float(sum(size for (axis, _), size in self.bytes.items() if axis == "these"))


def sent(function: Any, args: Any) -> Sent | None:
    """What a dispatched operation sends; None where it is no collective, or where this rank only receives."""
    if function.namespace != "c10d":
        return None
    kind = NAMES.get(function._schema.name.split("::")[1])
    groups = [dist.ProcessGroup.unbox(argument) for argument in args if is_group(argument)]
    if kind is None or not groups:
        return None
    (group,) = groups
    payload = max(sum(t.numel() * t.element_size() for t in tensors(argument)) for argument in args)
    if kind == "send":
        return Sent(group.group_name, kind, float(payload))
    share = (group.size() - 1) / group.size() * payload
    return Sent(group.group_name, kind, 2 * share if kind == "all-reduce" else share)


def is_group(argument: object) -> bool:
    """Whether an argument of a dispatched collective is its group."""
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())


def tensors(argument: object) -> list[Tensor]:
    """The tensors of an argument, however deep in lists."""
    if isinstance(argument, Tensor):
        return [argument]
    return [t for part in argument for t in tensors(part)] if isinstance(argument, list | tuple) else []


def axes_of(groups: Iterable[tuple[str, dist.ProcessGroup | None]]) -> dict[str, str]:
    """Names of groups of more than one rank -> their axes, the first that is named."""
    found: dict[str, str] = {}
    for axis, group in groups:
        if group is not None and group.size() > 1:
            found.setdefault(group.group_name, axis)
    return found
