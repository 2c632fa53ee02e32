"""A symmetric product: the tiles of the lower triangle, each stored twice."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlscale_kernels.triton_build import INTERPRET, Config, Launch, dot
from nlscale_kernels.tuned import chosen

CONFIGS = [
    Config({"TILE": 128, "DEPTH": 64}, warps=8, stages=4),
    Config({"TILE": 128, "DEPTH": 128}, warps=8, stages=3, least=90),
    Config({"TILE": 64, "DEPTH": 64}, warps=4, stages=4),
]
SMALL = Config({"TILE": 32, "DEPTH": 32}, warps=4, stages=2)  # for the interpreter, and matrices below a tile


@triton.jit
def symmetric_kernel(
    x,
    y,
    add,
    out,
    rows,
    columns,
    alpha,
    beta,
    x_batch,
    x_row,
    x_column,
    y_batch,
    y_row,
    y_column,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (n (n + 1) / 2, K) with n tiles a side."""
    place = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * place.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > place, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= place, i + 1, i)
    j = place - i * (i + 1) // 2
    x += matrix * x_batch
    y += matrix * y_batch
    size = tl.cast(rows, tl.int64)
    out += matrix * size * size
    at_i = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    at_j = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    at_k = tl.arange(0, DEPTH).to(tl.int64)
    total = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, tl.cdiv(columns, DEPTH)):
        inside = k * DEPTH + at_k
        left_mask = (at_i[:, None] < rows) & (inside[None, :] < columns)
        right_mask = (at_j[:, None] < rows) & (inside[None, :] < columns)
        left = tl.load(x + at_i[:, None] * x_row + inside[None, :] * x_column, mask=left_mask, other=0.0)
        right = tl.load(y + at_j[:, None] * y_row + inside[None, :] * y_column, mask=right_mask, other=0.0)
        total = dot(left, tl.trans(right), total, "ieee", UPCAST)
    total *= alpha
    mask = (at_i[:, None] < rows) & (at_j[None, :] < rows)
    if add is not None:
        add += matrix * size * size
        total += beta * tl.load(add + at_i[:, None] * size + at_j[None, :], mask=mask, other=0.0).to(tl.float32)
    said = total.to(out.dtype.element_ty)
    tl.store(out + at_i[:, None] * size + at_j[None, :], said, mask=mask)
    if i != j:
        mirrored = (at_j[:, None] < rows) & (at_i[None, :] < rows)
        tl.store(out + at_j[:, None] * size + at_i[None, :], tl.trans(said), mask=mirrored)


def symmetric_product(
    x_KNM: Tensor,
    y_KNM: Tensor,
    add_KNN: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    config: Config | None = None,
) -> Tensor:
    """As reference.symmetric_product; without a config, by the one that was tuned for the shape."""
    batch, rows, columns = x_KNM.shape
    out = torch.empty(batch, rows, rows, dtype=x_KNM.dtype, device=x_KNM.device)
    given: tuple[Any, ...] = (x_KNM, y_KNM, add_KNN, out, rows, columns, float(alpha), float(beta))
    small = SMALL if INTERPRET or rows < 64 else None
    config = config or small or chosen("symmetric_product", CONFIGS, x_KNM.device, rows=rows)
    options = config.options()
    side = triton.cdiv(rows, options["TILE"])
    grid = (side * (side + 1) // 2, batch)
    symmetric_kernel[grid](*given, *x_KNM.stride(), *y_KNM.stride(), UPCAST=INTERPRET, **options)
    return out


def launches() -> list[Launch]:
    """What is compiled ahead of time: whole matrices of bfloat16 and float16, and the wide ones' transposes."""
    found = []
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        for way, strides in (("", (2**24, 4096, 1)), (" transposed", (2**24, 1, 4096))):
            arguments = (dtype, dtype, dtype, dtype, 4096, 4096, 1.5, 0.5, *strides, *strides)
            constants = {"UPCAST": False}
            found.append(
                Launch(f"symmetric_product {name}{way}", symmetric_kernel, arguments, constants, CONFIGS, product=True)
            )
    one = (torch.bfloat16, torch.bfloat16, None, torch.bfloat16, 1, 4096, 1.0, 0.0, 4096, 4096, 1, 4096, 4096, 1)
    found.append(
        Launch("symmetric_product of one row", symmetric_kernel, one, {"UPCAST": False}, [SMALL], product=True)
    )
    return found
