"""The operator: the reference, and Triton on a GPU; arguments that do not fit are named."""

from typing import Any

import torch
from torch import Tensor

from nlscale_kernels import in_turn
from nlscale_kernels.arguments import NARROW, check, check_dtypes, check_programs, on_its_gpu
from nlscale_kernels.linear_memory import reference
from nlscale_kernels.linear_memory.reference import Given, Scalars

WIDEST = {"chunk": 64, "key width": 128}  # that the kernels have tiles for


@torch.library.custom_op("nlscale::matrix_memory", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scalars_SBHT: Tensor,
    ends_EBHN: Tensor,
    document_BT: Tensor | None,
    initial_HVK: Tensor,
    state_BHVK: Tensor,
    solves: bool,
    hears: bool,
) -> tuple[Tensor, Tensor]:
    """See reference.matrix_memory. Raises ValueError for arguments that do not fit."""
    given = Given(q, k, v, scalars_SBHT, ends_EBHN, document_BT, initial_HVK, state_BHVK, solves, hears)
    _check(given)
    return reference.matrix_memory(given)


@torch.library.custom_op("nlscale::matrix_memory_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scalars_SBHT: Tensor,
    ends_EBHN: Tensor,
    document_BT: Tensor | None,
    initial_HVK: Tensor,
    state_BHVK: Tensor,
    solves: bool,
    hears: bool,
    d_o: Tensor,
    d_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See reference.gradients."""
    given = Given(q, k, v, scalars_SBHT, ends_EBHN, document_BT, initial_HVK, state_BHVK, solves, hears)
    return tuple(reference.gradients(given, d_o, d_last))  # type: ignore[return-value]


def _forward_on_gpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    from nlscale_kernels.linear_memory import triton

    given = Given(*arguments)
    _check(given)
    if given.k.dtype not in NARROW:
        return reference.matrix_memory(given)
    _check_sizes(given)
    check_programs("matrix_memory", "rows x heads", given.k.shape[0] * given.k.shape[1])
    return triton.matrix_memory(given)


def _backward_on_gpu(*arguments: Any) -> tuple[Tensor, ...]:
    from nlscale_kernels.linear_memory import triton_backward

    *inputs, d_o, d_last = arguments
    given = Given(*inputs)
    if given.k.dtype not in NARROW:
        return tuple(reference.gradients(given, d_o, d_last))
    return triton_backward.gradients(given, d_o, d_last)


forward.register_kernel("cuda")(on_its_gpu(_forward_on_gpu))
backward.register_kernel("cuda")(on_its_gpu(_backward_on_gpu))


def _check(given: Given) -> None:
    name, (q, k, v) = "matrix_memory", given[:3]
    check(
        k.ndim == 4 and q.shape == k.shape and v.shape[:-1] == k.shape[:-1],
        f"{name}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, T, K), (B, H, T, K) and "
        "(B, H, T, V)",
    )
    (B, H, T, K), V, count = k.shape, v.shape[-1], given.ends.shape[-1]
    check(count > 0 and T % count == 0, f"{name}: ends are of {count} chunks, which must divide the {T} tokens")
    shapes = {
        "scalars": (len(Scalars._fields), B, H, T),
        "ends": (2, B, H, count),
        "document": (B, T),
        "initial": (H, V, K),
        "state": (B, H, V, K),
    }
    tensors: dict[str, Tensor | None] = {each: getattr(given, each) for each in ("q", "v", *shapes)}
    for each, tensor in tensors.items():
        if tensor is not None:
            shape = shapes.get(each, tensor.shape)
            check(tensor.shape == shape, f"{name}: {each} has shape {tuple(tensor.shape)}; it must have {shape}")
            check(
                tensor.device == k.device,
                f"{name}: {each} is on {tensor.device}, k on {k.device}; move {each} there",
            )
    check_dtypes(name, (*NARROW, torch.float64), k=k)
    check_dtypes(name, (k.dtype,), q=q, v=v)
    check_dtypes(name, (torch.int32, torch.int64), document=given.document)
    wide = {each: tensors[each] for each in ("scalars", "ends", "initial", "state")}
    check_dtypes(name, (torch.float64,) if k.dtype == torch.float64 else (torch.float32,), **wide)


def _check_sizes(given: Given) -> None:
    found = {"chunk": given.k.shape[2] // given.ends.shape[-1], "key width": given.k.shape[3]}
    for what, size in found.items():
        check(
            size <= WIDEST[what],
            f"matrix_memory: no kernel for a {what} of {size}, above {WIDEST[what]}; train.kernels=reference computes it",
        )


@forward.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    return given[2].new_empty(given[2].shape), given[7].new_empty(given[7].shape)


@backward.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    document = 5
    return tuple(each.new_empty(each.shape) for place, each in enumerate(given[:8]) if place != document)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.solves, ctx.hears = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_o: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
    given = Given._make((*ctx.saved_tensors, ctx.solves, ctx.hears))
    if in_turn.asked():
        found: Any = reference.gradients(given, d_o, d_last)
    else:
        found = backward(*given, d_o, d_last)
    q, k, v, scalars, ends, initial, state = found
    return q, k, v, scalars, ends, None, initial, state, None, None


forward.register_autograd(_backward, setup_context=_save)


def matrix_memory(given: Given) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, V) and the state (B, H, V, K) after the last token.

    On a GPU, and where torch.compile traces, the operator, which keeps its inputs alone; else the reference, for which
    autograd keeps what backward needs.
    """
    if not given.k.is_cpu or torch.compiler.is_compiling():
        o, state = forward(*given)
        return o, state
    _check(given)
    return reference.matrix_memory(given)
