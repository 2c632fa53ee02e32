"""megatron-core without a GPU: nothing happens where CUDA exists, so one program runs on gloo and on NCCL.

megatron-core names the CUDA device in three ways on the paths that are used here: `torch.cuda.current_device()` for
buffers of the pipeline and of sequence parallelism, `torch.cuda.synchronize()` after a batched send, and
`torch.zeros(..., device="cuda")` for the token count of a schedule.
"""

import types
from typing import Any

import megatron.core.transformer.multi_token_prediction  # noqa: F401, schedules import it at their first step, in each rank
import torch
from megatron.core.pipeline_parallel import schedules

CPU = torch.device("cpu")


class CpuTorch(types.ModuleType):
    """`torch` as megatron-core's schedules see it: zeros asked for on "cuda" are made on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """As torch.zeros, with the device turned to the CPU."""
        return torch.zeros(*size, device=CPU, **options)


def install() -> None:
    """Lets megatron-core run on CPU tensors. Call once a process, before groups are made."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    schedules.torch = CpuTorch("torch")
