"""The operators: the reference, and Triton on a GPU; arguments that do not fit are named."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nlscale_kernels.arguments import NARROW, check, check_alike, check_dtypes, described, on_its_gpu
from nlscale_kernels.level_step import reference
from nlscale_kernels.level_step.table import BLOCK, AdamW, Descend, Momenta

WIDE = (torch.float32, torch.float64)  # the kernels compute in float32; float64 is the reference's, on a GPU too


def _check(
    operator: str, like: str, columns: int, table: Tensor, blocks: Tensor | None, **tensors: Tensor | None
) -> None:
    """Raises ValueError where arguments do not fit one another."""
    model = tensors[like]
    assert model is not None
    check(model.ndim == 1, f"{operator}: {like} has {model.ndim} axes; it takes flat memory, .view(-1) would do")
    check_alike(operator, like, tensors)
    check_dtypes(operator, WIDE, **{like: model})
    check_dtypes(operator, (*NARROW, model.dtype), **tensors)
    check(
        table.ndim == 2 and table.shape[1] == columns and table.dtype == model.dtype and table.device == model.device,
        f"{operator}: table is {described(table)}; it must have {columns} columns, in "
        f"{like}'s dtype {model.dtype} on {model.device} (level_step.table makes it)",
    )
    count = -(-model.numel() // BLOCK)
    check(
        blocks is None or (blocks.shape == (count,) and blocks.dtype == torch.int32 and blocks.device == model.device),
        f"{operator}: blocks is {described(blocks)}; it must be torch.int32 {(count,)} on {model.device}, one for each "
        f"{BLOCK} elements",
    )


def _check_adamw(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    table: Tensor,
    blocks: Tensor | None = None,
    clear: bool = False,
) -> None:
    tensors = {"master": master, "gradient": gradient, "first": first, "second": second, "copy": copy}
    _check("level_adamw", "master", len(AdamW.__dataclass_fields__), table, blocks, **tensors)
    check_dtypes("level_adamw", (master.dtype,), first=first, second=second)


def _check_momenta(
    gradient: Tensor,
    momentum: Tensor,
    total: Tensor | None,
    slow: Tensor | None,
    table: Tensor,
    blocks: Tensor | None = None,
    clear: bool = False,
) -> None:
    tensors = {"gradient": gradient, "momentum": momentum, "total": total, "slow": slow}
    _check("level_momenta", "momentum", len(Momenta.__dataclass_fields__), table, blocks, **tensors)
    check_dtypes("level_momenta", (momentum.dtype,), total=total, slow=slow)
    check((total is None) == (slow is None), "level_momenta: total and slow come together")


def _check_descend(
    master: Tensor, direction: Tensor, copy: Tensor | None, table: Tensor, blocks: Tensor | None = None
) -> None:
    tensors = {"master": master, "direction": direction, "copy": copy}
    _check("level_descend", "master", len(Descend.__dataclass_fields__), table, blocks, **tensors)


@torch.library.custom_op("nlscale::level_adamw", mutates_args=("master", "gradient", "first", "second", "copy"))
def adamw(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    table: Tensor,
    blocks: Tensor | None = None,
    clear: bool = False,
) -> Tensor:
    """See reference.adamw. Raises ValueError for arguments that do not fit."""
    _check_adamw(master, gradient, first, second, copy, table, blocks)
    return reference.adamw(master, gradient, first, second, copy, table, blocks, clear)


@torch.library.custom_op("nlscale::level_momenta", mutates_args=("gradient", "momentum", "total", "slow"))
def momenta(
    gradient: Tensor,
    momentum: Tensor,
    total: Tensor | None,
    slow: Tensor | None,
    table: Tensor,
    blocks: Tensor | None = None,
    clear: bool = False,
) -> None:
    """See reference.momenta. Raises ValueError for arguments that do not fit."""
    _check_momenta(gradient, momentum, total, slow, table, blocks)
    reference.momenta(gradient, momentum, total, slow, table, blocks, clear)


@torch.library.custom_op("nlscale::level_descend", mutates_args=("master", "copy"))
def descend(
    master: Tensor, direction: Tensor, copy: Tensor | None, table: Tensor, blocks: Tensor | None = None
) -> Tensor:
    """See reference.descend. Raises ValueError for arguments that do not fit."""
    _check_descend(master, direction, copy, table, blocks)
    return reference.descend(master, direction, copy, table, blocks)


def _on_gpu(name: str, check_all: Callable[..., None]) -> Callable[..., Tensor | None]:
    """The Triton form of an operator; float64 is the reference's there, too."""

    def kernel(*given: Any, **named: Any) -> Tensor | None:
        from nlscale_kernels.level_step import triton

        check_all(*given, **named)
        wide = any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in given)
        return getattr(reference if wide else triton, name)(*given, **named)

    return kernel


def _told(master: Tensor, *rest: Any, **named: Any) -> Tensor:
    return master.new_empty(-(-master.numel() // BLOCK))


adamw.register_kernel("cuda")(on_its_gpu(_on_gpu("adamw", _check_adamw)))
momenta.register_kernel("cuda")(on_its_gpu(_on_gpu("momenta", _check_momenta)))
descend.register_kernel("cuda")(on_its_gpu(_on_gpu("descend", _check_descend)))
adamw.register_fake(_told)
descend.register_fake(_told)
momenta.register_fake(lambda *given, **named: None)
