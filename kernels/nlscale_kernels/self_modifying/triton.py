"""The solve that all memories of a head share: the inverse of linear_memory, its transpose applied, and the way back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlscale_kernels.linear_memory.triton import APPLY, apply, config_for, inverses_of, padded, share
from nlscale_kernels.self_modifying.op import Given, Gradients
from nlscale_kernels.triton_build import INTERPRET, Config, Launch, dot

GRADIENT = [Config({"V": 32}, warps=8, stages=1), Config({"V": 64}, warps=8, stages=1, least=90)]
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def gradients_kernel(
    k,
    erase,
    earlier,
    total,
    after,
    document,
    said,
    y,
    d_k,
    d_erase,
    d_earlier,
    d_total,
    d_after,
    heads,
    chunk,
    width,
    C: tl.constexpr,
    V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (B H,): op.gradients, y known."""
    head, tokens = tl.program_id(0).to(tl.int64), tl.arange(0, C)
    narrow: tl.constexpr = k.dtype.element_ty
    inside, at = tokens < chunk, head * chunk + tokens
    d_matrix, products = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    of_after = tl.zeros((C,), tl.float32)
    for first in range(0, width, V):
        columns = first + tl.arange(0, V)
        mask = inside[:, None] & (columns[None, :] < width)
        spot = at[:, None] * width + columns[None, :]
        key = tl.load(k + spot, mask=mask, other=0.0)
        come = tl.load(y + spot, mask=mask, other=0.0)
        known = tl.load(said + spot, mask=mask, other=0.0)
        products = dot(key, tl.trans(key), products, "tf32", UPCAST)
        d_matrix = dot(known, tl.trans(come), d_matrix, "tf32", UPCAST)
        of_after += tl.sum(come.to(tl.float32) * key.to(tl.float32), 1)
    tl.store(d_after + at, of_after, mask=inside)
    row_share = tl.load(earlier + at, mask=inside, other=0.0)
    column_share = tl.load(total + at, mask=inside, other=0.0)
    d_matrix *= -share(row_share, column_share, tokens, inside, document, head // heads * chunk, -1)
    turned = d_matrix * products
    tl.store(d_erase + at, tl.sum(turned, 1), mask=inside)
    taken = tl.load(erase + at, mask=inside, other=0.0)
    turned *= taken[:, None]
    tl.store(d_earlier + at, tl.sum(turned, 1) * LN2, mask=inside)
    tl.store(d_total + at, tl.sum(turned, 0) * -LN2, mask=inside)
    of_products = (taken[:, None] * d_matrix).to(narrow)
    left = tl.load(after + at, mask=inside, other=0.0)
    for first in range(0, width, V):
        columns = first + tl.arange(0, V)
        mask = inside[:, None] & (columns[None, :] < width)
        spot = at[:, None] * width + columns[None, :]
        key = tl.load(k + spot, mask=mask, other=0.0)
        told = left[:, None] * tl.load(y + spot, mask=mask, other=0.0).to(tl.float32)
        told = dot(of_products, key, told, "tf32", UPCAST)
        turned_told = dot(tl.trans(key), of_products, tl.zeros((V, C), tl.float32), "tf32", UPCAST)
        told += tl.trans(turned_told)
        tl.store(d_k + spot, told.to(narrow), mask=mask)


def ready(given: Given) -> Given:
    """Contiguous, documents counted in int32."""
    document = None if given.document is None else given.document.int().contiguous()
    return Given._make((*(x.contiguous() for x in given[:5]), document))


def reach(given: Given, config: Config | None = None) -> Tensor:
    """As op.reached."""
    given = ready(given)
    k, erase, earlier, total, after, document = given
    out = torch.empty_like(k)
    config = config_for("matrix_memory.apply", APPLY, config, k)
    apply(k, after, inverses_of(k, erase, earlier, total, document, 1), out, 1, True, config)
    return out


def gradients(
    given: Given, said: Tensor, d_reach: Tensor, configs: tuple[Config | None, Config | None] = (None, None)
) -> Gradients:
    """As op.gradients."""
    given = ready(given)
    k, erase, earlier, total, _, document = given
    y, found = torch.empty_like(k), Gradients._make(torch.empty_like(x) for x in given[:5])
    config = config_for("matrix_memory.apply", APPLY, configs[0], k)
    apply(d_reach.contiguous(), None, inverses_of(k, erase, earlier, total, document, 1), y, 1, False, config)
    (B, H, chunk, width), config = k.shape, config_for("reach.gradients", GRADIENT, configs[1], k)
    options = {"C": padded(chunk), "UPCAST": INTERPRET, **config.options()}
    gradients_kernel[(B * H,)](*given, said.contiguous(), y, *found, H, chunk, width, **options)
    return found


def launches() -> list[Launch]:
    """What is compiled ahead of time beside linear_memory's: chunks of 64 and 128 tokens, with documents; and the walk."""
    from nlscale_kernels.self_modifying import triton_backward

    wide, found = torch.float32, []
    for narrow in (torch.bfloat16, torch.float32):
        for chunk in (64, 128):
            given = (narrow, *[wide] * 4, torch.int32, narrow, narrow, narrow, *[wide] * 4, 16, chunk, 64)
            constants = {"C": chunk, "UPCAST": False}
            spills = 4096 if chunk == 128 else 0  # float32, most on sm_80
            name = f"gradients {str(narrow)[6:]} {chunk}"
            found.append(Launch(name, gradients_kernel, given, constants, GRADIENT, product=True, spills=spills))
    return [*found, *triton_backward.launches()]
