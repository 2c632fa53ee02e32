"""What operators say of arguments that they cannot take."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # the kernels'; float64 is the references', on a GPU too
PROGRAMS = 65535  # on the second and third axes of a grid
Kernel = Callable[..., Any]


def check(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def on_its_gpu(kernel: Kernel) -> Kernel:
    """A kernel that runs on the GPU of its first tensor, whichever is current."""

    @wraps(kernel)
    def run(*given: Any, **named: Any) -> Any:
        with torch.cuda.device_of(next(each for each in given if isinstance(each, Tensor))):
            return kernel(*given, **named)

    return run


def check_programs(operator: str, what: str, count: int) -> None:
    """Raises ValueError where a kernel would have more programs on an axis of its grid than a GPU takes."""
    check(
        count <= PROGRAMS,
        f"{operator}: {what} are {count}, and a GPU takes {PROGRAMS} a call; fewer at a time would do",
    )


def check_divides(chunk: int, tokens: int, of: str = "") -> None:
    """Raises ValueError, with chunks that would work, unless `chunk` divides the tokens (`of` what)."""
    if tokens % chunk:
        works = [str(size) for size in range(1, tokens + 1) if tokens % size == 0][-6:]
        raise ValueError(f"{tokens} tokens{of} are no multiple of the chunk of {chunk}; {', '.join(works)} would work")


def check_dtypes(operator: str, allowed: Sequence[torch.dtype], **tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor has another dtype than these."""
    for name, tensor in tensors.items():
        check(
            tensor is None or tensor.dtype in allowed,
            f"{operator}: {name} is {tensor is not None and tensor.dtype}; it takes {', '.join(map(str, allowed))}",
        )


def check_devices(operator: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor is on another device."""
    for name, tensor in tensors.items():
        check(
            tensor is None or tensor.device == device,
            f"{operator}: {name} is on {tensor is not None and tensor.device}; move it to {device}",
        )


def alike(tensor: Tensor, shape: Sequence[int], like: Tensor) -> bool:
    """Whether a tensor has this shape, and the dtype and the device of `like`."""
    return tensor.shape == tuple(shape) and tensor.dtype == like.dtype and tensor.device == like.device


def described(tensor: Tensor | None) -> str:
    """Such as `torch.float32 (2, 3) on cuda:0`."""
    return "None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def check_alike(operator: str, like: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError where a tensor is not laid out like `like`: its shape, on its device, contiguous."""
    model = tensors[like]
    assert model is not None
    for name, tensor in tensors.items():
        if tensor is not None:
            check(
                tensor.shape == model.shape,
                f"{operator}: {name} has shape {tuple(tensor.shape)}; it must have {like}'s, {tuple(model.shape)}",
            )
            check(
                tensor.device == model.device,
                f"{operator}: {name} is on {tensor.device}, {like} on {model.device}; move {name} there",
            )
            check(
                tensor.is_contiguous(),
                f"{operator}: {name} has strides {tensor.stride()}; .contiguous() would do",
            )
