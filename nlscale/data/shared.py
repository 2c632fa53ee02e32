"""The names under which a node's ranks share memory through mosaicml-streaming."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from nlscale.data.mds import prefix
from nlscale.runtime.world import World


@contextmanager
def one_name(world: World) -> Iterator[None]:
    """Within it streaming takes on all ranks of a node the free name that the first of them found.

    By itself every rank looks, and where another job ends between two looks they find different ones: the start fails.
    """
    look = prefix._check_and_find_retrying

    def of_first(*args: Any, **options: Any) -> int:
        """What this rank's node found. A collective over all ranks."""
        found = torch.tensor([look(*args, **options)], device=world.device)
        if not dist.is_initialized():
            return int(found)
        everyone = found.new_empty(world.size)
        dist.all_gather_into_tensor(everyone, found)
        return int(everyone[world.rank - world.local_rank])

    prefix._check_and_find_retrying = of_first
    try:
        yield
    finally:
        prefix._check_and_find_retrying = look
