"""What one rank finds out and all must act on."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from nlscale.config.errors import StoppedOnPurpose, UserError
from nlscale.runtime.world import World

KINDS: tuple[type[Exception], ...] = (UserError, StoppedOnPurpose, OSError)


def led(world: World, action: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """What rank 0's `action` gives, on every rank; an error of KINDS is raised on every rank. A collective."""
    said: list[Any] = [None, None, None]
    if world.leads:
        try:
            said[0] = action()
        except KINDS as error:
            said[1:] = [next(place for place, kind in enumerate(KINDS) if isinstance(error, kind)), str(error)]
    dist.broadcast_object_list(said, src=0, group=group)
    if said[1] is not None:
        raise KINDS[said[1]](said[2])
    return said[0]


def everywhere(action: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """What `action` gives on each rank, on every rank; the first rank's OSError is raised on every rank. A collective."""
    mine: tuple[Any, str | None]
    try:
        mine = action(), None
    except OSError as error:
        mine = None, str(error)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=group)
    for _, fault in found:
        if fault is not None:
            raise OSError(fault)
    return [given for given, _ in found]
