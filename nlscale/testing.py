"""ranks(n): a function on n real gloo processes, forked after import so that a test pays for imports once."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from nlscale_launch.local import free_port, start


def ranks(count: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Results of `function(*args)` on `count` ranks, by rank; the errors of ranks are raised here.

    The ranks find each other through the environment, as under torchrun.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:

        def run(rank: int) -> None:
            torch.set_num_threads(1)
            torch.save(function(*args), f"{folder}/{rank}.pt")

        code = start(count, run, environment={"MASTER_PORT": str(free_port())}, logs=folder, timeout=timeout)
        if code:
            logs = [open(f"{folder}/rank-{rank:05d}.log").read() for rank in range(count)]
            failed = [log for log in logs if "Traceback" in log] or logs  # the others may have lost their peer
            raise RuntimeError("\n".join([f"{count} ranks ended with {code}", *(log[-20000:] for log in failed)]))
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(count)]


os.environ.setdefault("OMP_NUM_THREADS", "1")
