"""Peaks: the FLOP/s that model FLOPs utilisation is measured against, and the most memory that a rank has held."""

import math
import resource
import time

import torch
import torch.distributed as dist

from nlscale.config.devices import DEVICES


def peak_flops(given: float | None, dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    """(FLOP/s of all ranks together, where the figure is from). A collective.

    A given figure counts for each rank; else the GPU's vendor figure; on a CPU, the speed of the fastest of some
    matrix products, on all ranks at once.
    """
    if given is not None:
        return given * dist.get_world_size(), "log.peak_flops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, gpu in DEVICES.items():
            if word.upper() in name:
                each = gpu.flops if dtype == torch.bfloat16 else gpu.flops_fp32
                return each * dist.get_world_size(), f"vendor figure of {word.upper()}"
    speed = torch.tensor(measured(dtype, device), dtype=torch.float64, device=device)
    dist.all_reduce(speed)
    return float(speed), "matrix products measured at start"


def measured(dtype: torch.dtype, device: torch.device, size: int = 1024, seconds: float = 0.4) -> float:
    """FLOP/s of the fastest size x size x size product on this rank, while all ranks of the machine do the same.

    The fastest, as what else the machine does slows others.
    """
    a, fastest = torch.randn(size, size, dtype=dtype, device=device), math.inf
    a @ a
    dist.barrier()
    now = began = time.perf_counter()
    while now - began < seconds:
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        before, now = now, time.perf_counter()
        fastest = min(fastest, now - before)
    return 2 * size**3 / fastest


def peak_bytes() -> int:
    """Peak memory of this rank: of the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
