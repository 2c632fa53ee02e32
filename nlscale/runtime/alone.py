"""What only one job of a user may do on a machine at a time."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from nlscale.runtime.world import World


def lock_file() -> Path:
    """This user's."""
    return Path(tempfile.gettempdir()) / f"nlscale-{os.getuid()}.lock"


@contextmanager
def alone_on_node(local_rank: int, seconds: float = 60) -> Iterator[None]:
    """Within it no other job of this user is, on any node of this one. A collective over all ranks.

    The kernel gives the lock back when its holder dies. After `seconds` a rank goes on without it: two jobs that share two
    nodes could each hold one of them.
    """
    file = lock_file().open("a") if local_rank == 0 else None
    try:
        if file is not None:
            acquire(file.fileno(), seconds)
        together()
        yield
        together()
    finally:
        if file is not None:
            file.close()


def acquire(descriptor: int, seconds: float) -> bool:
    """Whether the lock was had in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def of_first(number: int, world: World) -> int:
    """The number that the first rank of this one's node brought. A collective over all ranks."""
    mine = torch.tensor([number], device=world.device)
    everyone = mine.new_empty(world.size)
    dist.all_gather_into_tensor(everyone, mine)
    return int(everyone[world.rank - world.local_rank])


def together() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()
