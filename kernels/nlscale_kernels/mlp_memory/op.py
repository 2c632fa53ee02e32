"""What lies between a memory's products as operators: torch's form, and Triton on a GPU.

None has a gradient of its own: lean.py calls them in its forward and backward. Arguments that do not fit are named.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nlscale_kernels.arguments import NARROW, alike, check, check_devices, check_dtypes, described, on_its_gpu
from nlscale_kernels.mlp_memory import glue
from nlscale_kernels.mlp_memory.glue import ACTIVATIONS, TORCH, Glue, Second


def _active(before: Tensor, kind: str) -> Tensor:
    """s(before): (..., I) -> (..., M)."""
    _check_kind(kind, before)
    return ACTIVATIONS[kind].active(before)


def _returned(before: Tensor, inward: Tensor, beside: Tensor | None, kind: str) -> Tensor:
    """J^T inward, + beside: (..., I)."""
    _check_returned(before, inward, beside, kind)
    found = ACTIVATIONS[kind].returned(before, inward.clone())
    return found if beside is None else found.add_(beside)


def _second(before: Tensor, inward: Tensor, d_back: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """glue.Second without what is kept."""
    _check_second(before, inward, d_back, kind)
    found = ACTIVATIONS[kind].second(before, inward.clone(), d_back.clone())
    return found.active, found.pulled, found.pushed, found.bent


def _errors(heard: Tensor, target: Tensor, key: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    """See glue.errors."""
    _check_errors(heard, target, key, weights)
    return glue.errors(heard.clone(), target, key, weights)


def _of_errors(heard: Tensor, error: Tensor, weights: Tensor, through: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See glue.of_errors."""
    _check_of_errors(heard, error, weights, through)
    return glue.of_errors(heard, error, weights, through.clone())


active = torch.library.custom_op("nlscale::mlp_active", _active, mutates_args=())
returned = torch.library.custom_op("nlscale::mlp_returned", _returned, mutates_args=())
second = torch.library.custom_op("nlscale::mlp_second", _second, mutates_args=())
errors = torch.library.custom_op("nlscale::mlp_errors", _errors, mutates_args=())
of_errors = torch.library.custom_op("nlscale::mlp_of_errors", _of_errors, mutates_args=())


@active.register_fake
def _(before: Tensor, kind: str) -> Tensor:
    return before.new_empty(*before.shape[:-1], _units(kind, before))


@returned.register_fake
def _(before: Tensor, inward: Tensor, beside: Tensor | None, kind: str) -> Tensor:
    return before.new_empty(before.shape)


@second.register_fake
def _(before: Tensor, inward: Tensor, d_back: Tensor, kind: str) -> tuple[Tensor, ...]:
    narrow = (*before.shape[:-1], _units(kind, before))
    return tuple(before.new_empty(shape) for shape in (narrow, before.shape, narrow, before.shape))


@errors.register_fake
def _(heard: Tensor, target: Tensor, key: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    return heard.new_empty(heard.shape), heard.new_empty(*heard.shape[:-1], heard.shape[-1] * weights.shape[-1])


@of_errors.register_fake
def _(heard: Tensor, error: Tensor, weights: Tensor, through: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return weights.new_empty(weights.shape), error.new_empty(error.shape), heard.new_empty(heard.shape)


def _units(kind: str, before: Tensor) -> int:
    return before.shape[-1] // 2 if kind == "swiglu" else before.shape[-1]


def _check_kind(kind: str, before: Tensor) -> None:
    check(kind in ACTIVATIONS, f"mlp_memory: no activation {kind}; choose of {', '.join(ACTIVATIONS)}")
    check_dtypes("mlp_memory", (*NARROW, torch.float64), before=before)
    even = kind != "swiglu" or before.shape[-1] % 2 == 0
    check(even, f"mlp_memory: swiglu halves {before.shape[-1]} columns; they must be even")


def _check_inner(kind: str, before: Tensor, **tensors: Tensor) -> None:
    _check_kind(kind, before)
    _check_like("mlp_memory", before, (*before.shape[:-1], _units(kind, before)), **tensors)


def _check_returned(before: Tensor, inward: Tensor, beside: Tensor | None, kind: str) -> None:
    _check_inner(kind, before, inward=inward)
    if beside is not None:
        _check_like("mlp_memory", before, before.shape, beside=beside)


def _check_second(before: Tensor, inward: Tensor, d_back: Tensor, kind: str) -> None:
    _check_inner(kind, before, inward=inward)
    _check_like("mlp_memory", before, before.shape, d_back=d_back)


def _check_like(operator: str, like: Tensor, shape: Sequence[int], **tensors: Tensor) -> None:
    for each, tensor in tensors.items():
        check(
            alike(tensor, shape, like),
            f"{operator}: {each} is {described(tensor)}; it must be {like.dtype} {tuple(shape)} on {like.device}",
        )


def _check_errors(heard: Tensor, target: Tensor, key: Tensor | None, weights: Tensor) -> None:
    check(heard.ndim == 5, f"mlp_errors: heard has shape {tuple(heard.shape)}; it takes (B, H, N, C, O)")
    B, H, N, C, width = heard.shape
    check_dtypes("mlp_errors", (*NARROW, torch.float64), heard=heard)
    check_dtypes("mlp_errors", (heard.dtype,), target=target, key=key, weights=weights)
    check_devices("mlp_errors", heard.device, target=target, key=key, weights=weights)
    check(
        target.shape in ((B, H, N, C, width), (B, H, 1, C, width)),
        f"mlp_errors: target has shape {tuple(target.shape)}; it must have {(B, H, N, C, width)}, or 1 for N",
    )
    check(
        key is None or key.shape == (B, H, C, width),
        f"mlp_errors: key has shape {key is not None and tuple(key.shape)}; it must have {(B, H, C, width)}",
    )
    check(
        weights.shape[:-1] == (B, H, C),
        f"mlp_errors: weights have shape {tuple(weights.shape)}; they must have {(B, H, C)} and one number a weight",
    )


def _check_of_errors(heard: Tensor, error: Tensor, weights: Tensor, through: Tensor) -> None:
    _check_errors(error, error, None, weights)
    _check_like("mlp_of_errors", error, error.shape, through=through)
    _check_like("mlp_of_errors", error, (*error.shape[:-1], error.shape[-1] * weights.shape[-1]), heard=heard)


def _on_gpu(operator: Any, name: str, plain: Callable[..., Any], fits: Callable[..., None]) -> None:
    """What CUDA tensors go to: the kernel of this name, or torch's form where its first argument is of another dtype."""

    def run(*given: Any) -> Any:
        from nlscale_kernels.mlp_memory import triton

        if given[0].dtype not in NARROW:
            return plain(*given)
        fits(*given)
        return getattr(triton, name)(*given)

    operator.register_kernel("cuda")(on_its_gpu(run))


_on_gpu(active, "active", _active, lambda before, kind: _check_kind(kind, before))
_on_gpu(returned, "returned", _returned, _check_returned)
_on_gpu(second, "second", _second, _check_second)
_on_gpu(errors, "errors", _errors, _check_errors)
_on_gpu(of_errors, "of_errors", _of_errors, _check_of_errors)


def _rise(before: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return active(before, kind), before


def _turned(before: Tensor, inward: Tensor, d_back: Tensor, kind: str) -> Second:
    said, pulled, pushed, bent = second(before, inward, d_back, kind)
    return Second(said, pulled, pushed, bent, before)


def _glue(kind: str) -> Glue:
    """By operators; what is kept of W2 z is itself, and the kernels make its curve anew."""
    return Glue(
        partial(active, kind=kind),
        lambda before, inward: returned(before, inward, None, kind),
        partial(_rise, kind=kind),
        lambda before, inward: returned(before, inward, None, kind),
        partial(_turned, kind=kind),
        lambda before, d_active, bent: returned(before, d_active, bent, kind),
        errors,
        of_errors,
    )


OPERATORS = {kind: _glue(kind) for kind in ACTIVATIONS}


def glue_for(x: Tensor, activation: str) -> Glue:
    """Operators on a GPU; else torch's, which writes over what is no longer needed, and which torch.compile can fuse."""
    check(activation in TORCH, f"mlp_memory: no activation {activation}; choose of {', '.join(TORCH)}")
    return (TORCH if x.is_cpu else OPERATORS)[activation]
