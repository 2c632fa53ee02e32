"""reach: its definition, gradients written out against autograd's, the kernels, interpreted, against both."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.self_modifying import op, triton
from nlscale_kernels.triton_build import Config
from torch import Tensor

B, H = 2, 2
TINY = Config({"V": 16}, warps=4, stages=1)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
NAMES = op.Gradients._fields


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def given(chunk: int = 12, width: int = 5, documents: bool = True) -> list[Any]:
    k = F.normalize(numbers(B, H, chunk, width), dim=-1)
    log = -numbers(B, H, chunk, seed=1).abs()
    total = log.cumsum(-1)
    erase, after = torch.sigmoid(numbers(B, H, chunk, seed=2)), (total[..., -1:] - total).exp2()
    document = (numbers(B, chunk, seed=3) > 1).cumsum(-1).int() if documents else None
    return [k, erase, total - log, total, after, document]


def test_reach_undoes_what_later_tokens_erase() -> None:
    """Token by token: what t wrote, times (I - e_i k_i k_i^T) with decay for every later i of its document."""
    k, erase, earlier, total, after, document = given()
    keep = (total - earlier).exp2()
    for document_BC in (None, document):
        found = op.reached(op.Given(k, erase, earlier, total, after, document_BC))
        for t in range(k.shape[2]):
            row, inside = k[:, :, t].clone(), torch.ones(B, dtype=torch.bool)
            for i in range(t + 1, k.shape[2]):
                inside = inside if document_BC is None else document_BC[:, i] == document_BC[:, t]
                along = (row * k[:, :, i]).sum(-1, keepdim=True)
                then = keep[:, :, i, None] * row - erase[:, :, i, None] * along * k[:, :, i]
                row = torch.where(inside[:, None, None], then, row)
            same = torch.ones(B, dtype=torch.bool) if document_BC is None else document_BC[:, t] == document_BC[:, -1]
            torch.testing.assert_close(found[same, :, t], row[same], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "documents"])
def test_gradients_written_out_are_autograds(documents: bool) -> None:
    *leaves, document = given(documents=documents)
    leaves = [x.requires_grad_() for x in leaves]
    this = op.Given(*leaves, document)
    said, of = op.reached(this), numbers(B, H, 12, 5, seed=4)
    expected = torch.autograd.grad(said, leaves, of)
    with torch.no_grad():
        mine = op.gradients(this, said, of)
    for name, d, theirs in zip(NAMES, mine, expected, strict=True):
        torch.testing.assert_close(d, theirs, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("chunk", "width"), [(12, 5), (40, 19), (70, 33)])
@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "documents"])
def test_kernels(documents: bool, chunk: int, width: int, dtype: torch.dtype) -> None:
    k, *scalars, document = given(chunk, width, documents)
    of = numbers(*k.shape, seed=4).to(dtype)
    narrow = op.Given(k.to(dtype), *(x.float() for x in scalars), document)
    wide = op.Given._make(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in narrow)
    said = op.reached(wide)
    mine = (triton.reach(narrow, TINY), *triton.gradients(narrow, said.to(dtype), of, (TINY, TINY)))
    plain = (op.reached(narrow), *op.gradients(narrow, said.to(dtype), of))  # narrow numbers are the reference's too
    assert all(
        float((x.double() - y).norm()) <= TOLERANCE[dtype] * float(y.norm())
        for x, y in zip(plain, (said, *op.gradients(wide, said, of.double())), strict=True)
    )
    for name, found, theirs in zip(
        ("reach", *NAMES), mine, (said, *op.gradients(wide, said, of.double())), strict=True
    ):
        error = float((found.double() - theirs).norm() / theirs.norm())
        assert found.isfinite().all() and error <= TOLERANCE[dtype], (name, error)


def test_operator_is_well_formed_and_twice_differentiable() -> None:
    *leaves, document = given(4, 2)
    leaves = [x.requires_grad_() for x in leaves]
    torch.library.opcheck(op.reach, (*leaves, document))
    for reach in (op.reach, lambda *x: op.arriving(op.Given(*x))):
        assert torch.autograd.gradcheck(lambda *x, f=reach: f(*x, document), leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *x, f=reach: f(*x, document), leaves, fast_mode=True)


def test_what_a_gpu_runs_is_the_operator() -> None:
    narrow = op.Given._make(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given())
    said, of = op.reached(narrow), numbers(B, H, 12, 5, seed=4).float()
    torch.testing.assert_close(op.reach._backend_fns["cuda"](*narrow), said)
    found = op.backward._backend_fns["cuda"](*narrow, said, of)
    for mine, theirs in zip(found, op.gradients(narrow, said, of), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, numbers(B, H, 12), "it takes \\(B, H, C, K\\)"),
        (1, numbers(B, H, 11), r"erase is .* it must be \(2, 2, 12\)"),
        (4, numbers(B, H, 12).float(), "after is torch.float32"),
        (5, torch.zeros(B, 11).int(), r"document is .* it must be \(2, 12\)"),
    ],
)
def test_bad_arguments_are_named(place: int, value: Tensor, words: str) -> None:
    arguments = given()
    arguments[place] = value
    for reach in (op.reach, lambda *x: op.arriving(op.Given(*x))):
        with pytest.raises(ValueError, match=words):
            reach(*arguments)


def test_sizes_without_a_kernel_are_named() -> None:
    narrow = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given(129)]
    with pytest.raises(ValueError, match=r"chunk of 129, above 128; another model\.self_modifying\.chunk"):
        op.reach._backend_fns["cuda"](*narrow)
