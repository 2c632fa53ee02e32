"""liger-kernel's operators on one GPU against torch's, in the precisions of training."""

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels import liger
from nlscale_kernels.rotary import rotary_table, rotate_both
from nlscale_kernels.swiglu import swiglu
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not liger.available(), reason="needs liger-kernel")]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative norms


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [1, 3])
def test_each_is_torchs(rows: int, dtype: torch.dtype) -> None:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)

    x, gains, fused, logits = numbers(64, rows, 256), numbers(256), numbers(64, rows, 2 * 704), numbers(128, 5000)
    targets = torch.randint(0, 5000, (128,), device="cuda").masked_fill(torch.arange(128, device="cuda") % 7 == 0, -1)
    heads, tables = numbers(64, rows, 6 * 32), rotary_table(64, 32, 1e4, torch.device("cuda"))
    tables = tuple(table.to(dtype) for table in tables)

    def parts() -> list[Tensor]:
        return [part.unflatten(-1, (-1, 32)) for part in heads.split([4 * 32, 2 * 32], -1)]

    cases = [
        (lambda: liger.rms_norm(x, gains, 1e-5), lambda: F.rms_norm(x, (256,), gains, 1e-5), [x, gains]),
        (lambda: liger.swiglu(fused), lambda: swiglu(fused), [fused]),
        (
            lambda: torch.cat(liger.rotate_both(*parts(), *tables), 2),
            lambda: torch.cat(rotate_both(*parts(), *tables), 2),
            [heads],
        ),
        (
            lambda: liger.cross_entropy(logits.float() * 1, targets, -1),
            lambda: F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=-1),
            [logits],
        ),
    ]
    for ours, theirs, leaves in cases:
        mine, right = ours(), theirs()
        of = torch.randn_like(right) if right.ndim else torch.ones_like(right)
        found, wanted = torch.autograd.grad(mine, leaves, of.clone()), torch.autograd.grad(right, leaves, of)
        for a, b in zip((mine, *found), (right, *wanted), strict=True):
            assert relative(a, b) <= LIMITS[dtype]
