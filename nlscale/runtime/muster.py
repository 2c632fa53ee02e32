"""All ranks meet, and prove that they compute and send: whoever is missing or wrong is named before training starts."""

import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.errors import BadHosts, UserError
from nlscale.runtime.outcome import here

SIDE = 256  # of the matrix that each rank multiplies
SUMMED = 2**16  # elements of the vector that all ranks add up


def meet(rank: int, size: int, seconds: float, timeout: timedelta) -> dist.Store:
    """The store in which all ranks have signed in; raises BadHosts naming those that did not within `seconds`.

    Raises UserError where the port of the first rank is taken.
    """
    try:
        store = opened(rank, size, timedelta(seconds=seconds))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            kind = RuntimeError if "SLURM_JOB_ID" in os.environ else UserError  # the next attempt takes another
            raise kind(
                f"the port that ranks meet at is taken; another MASTER_PORT would work ({first(error)})"
            ) from None
        raise RuntimeError(
            f"rank {rank} ({socket.gethostname()}) cannot reach the first rank: {first(error)}"
        ) from None
    store = dist.PrefixStore("muster", store)
    store.set(f"{rank}", socket.gethostname())
    if rank == 0:
        until, pause = time.monotonic() + seconds, 0.001
        missing = set(range(size))
        while missing := {each for each in missing if not store.check([f"{each}"])}:
            if time.monotonic() > until:
                hosts = sorted({host for each in missing if (host := host_of(each, size))})
                where = f" (host {', '.join(hosts)})" if hosts else ""
                raise BadHosts(f"{names(missing)}{where} of {size} did not come within {seconds:g} s", hosts)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
    store.set_timeout(timeout)
    return store


def opened(rank: int, size: int, patience: timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT: torchrun's own where it has started this process, else the first rank's."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(dist.rendezvous("env://", rank, size, timeout=patience))[0]
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) if size > 1 else 0  # any: nobody else comes
    if rank:
        knock(host, port, patience.total_seconds())
    return dist.TCPStore(host, port, size, is_master=rank == 0, timeout=patience, wait_for_workers=False)


def knock(host: str, port: int, seconds: float) -> None:
    """Waits until the first rank listens, at most so long: a store that comes too early tries again up to a second later."""
    until, pause = time.monotonic() + seconds, 0.005
    while (left := until - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), timeout=left).close()
            return
        except OSError:
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.1)
    raise dist.DistNetworkError(f"nobody listens at port {port} of {host} after {seconds:g} s")


def host_of(rank: int, size: int) -> str:
    """Where a rank is that said nothing: by the job's nodes, which Slurm fills in order. Empty where no job names them."""
    nodes = [node for node in os.environ.get("NLSCALE_NODES", "").split(",") if node]
    return nodes[rank * len(nodes) // size] if nodes and size % len(nodes) == 0 else ""


def first(error: Exception) -> str:
    """An error's first line."""
    return str(error).splitlines()[0]


def names(ranks: set[int]) -> str:
    """Some ranks in words; of many the first ones."""
    shown = ", ".join(str(rank) for rank in sorted(ranks)[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{' ...' if len(ranks) > 8 else ''}"


def prove(rank: int, size: int, device: torch.device) -> None:
    """Each rank multiplies matrices of whole numbers, and all add a vector up: exact, so that any difference is a fault.

    Raises BadHosts naming them. A collective.
    """
    summed = torch.full((SUMMED,), float(rank + 1), dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    faults = [
        "its matrix product" if computes_wrong(device) else "",
        "what reached it of a sum" if bool((summed != size * (size + 1) / 2).any()) else "",
    ]
    mine = (here(), " and ".join(fault for fault in faults if fault))
    found: list[tuple[str, str]] = [mine] * size
    dist.all_gather_object(found, mine)
    bad = [f"rank {each} (host {host}): {fault} is wrong" for each, (host, fault) in enumerate(found) if fault]
    if bad:
        raise BadHosts("; ".join(bad), sorted({host for host, fault in found if fault}))


def computes_wrong(device: torch.device) -> bool:
    """Whether a product of matrices of small whole numbers, exact in float32, differs from its closed form.

    (a b)_ij with a_ik = i, b_kj = j + k: i (n j + n (n - 1) / 2), taken modulo small numbers so that all fits 24 bits.
    """
    i, j = torch.arange(SIDE, device=device) % 7, torch.arange(SIDE, device=device) % 5
    a_IK: Tensor = i[:, None].float().expand(SIDE, SIDE).contiguous()
    b_KJ: Tensor = (j[None, :] + (torch.arange(SIDE, device=device) % 3)[:, None]).float()
    closed_IJ = i[:, None] * (SIDE * j[None, :] + sum(k % 3 for k in range(SIDE)))
    return not torch.equal((a_IK @ b_KJ).long(), closed_IJ)
