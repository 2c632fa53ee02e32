"""mlp_memory: what lies between its products as operators, and their kernels, interpreted, against torch in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nlscale_kernels.mlp_memory import Net, gathered, glue, lean, op, read, self_taught, triton
from nlscale_kernels.mlp_memory.glue import ACTIVATIONS, TORCH, Second
from torch import Tensor

B, H, N, C, K, M, W = 2, 2, 2, 5, 7, 19, 2
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inner(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """W2 z, what comes from the errors, what comes from later."""
    wide = 2 * M if kind == "swiglu" else M
    return 2 * numbers(B, H, N, C, wide), numbers(B, H, N, C, M, seed=1), numbers(B, H, N, C, wide, seed=2)


def sides(width: int = K, targets: int = 1) -> dict[str, Tensor]:
    return {
        "heard": numbers(B, H, N, C, width),
        "target": numbers(B, H, targets, C, width, seed=1),
        "key": numbers(B, H, C, width, seed=2),
        "weights": numbers(B, H, C, W, seed=3),
        "later": numbers(B, H, N, C, W * width, seed=4),
        "through": numbers(B, H, N, C, width, seed=5),
    }


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_written_out_activations_are_autograds(kind: str) -> None:
    """s, J^T, J and the second derivative, by differentiating s twice."""
    before, inward, d_back = (x.requires_grad_() for x in inner(kind))
    form = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}.get(kind)
    value = form(before) if form else torch.nn.functional.silu(before[..., :M]) * before[..., M:]
    (pulled,) = torch.autograd.grad(value, before, inward, create_graph=True)
    pushed, bent = torch.autograd.grad(pulled, (inward, before), d_back)
    plain = [x.detach() for x in (before, inward, d_back)]
    mine: Second = TORCH[kind].second(*(x.clone() for x in plain))
    for found, expected in zip(mine[:4], (value, pulled, pushed, bent), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-11, atol=1e-12)
    active, rise = TORCH[kind].rise(plain[0])
    torch.testing.assert_close(active, value.detach())
    for again in (TORCH[kind].pulled(rise, plain[1].clone()), TORCH[kind].returned(plain[0], plain[1].clone())):
        torch.testing.assert_close(again, pulled.detach(), rtol=1e-11, atol=1e-12)
    last = TORCH[kind].last(mine.kept, plain[1].clone(), bent.clone())
    torch.testing.assert_close(last, (pulled + bent).detach(), rtol=1e-11, atol=1e-12)


def near(mine: Any, expected: Any, dtype: torch.dtype) -> bool:
    """Whether all tensors are of this dtype and near those in float64; what is not finite is not near."""
    mine, expected = ([x] if isinstance(x, Tensor) else x for x in (mine, expected))
    return all(
        given.dtype == dtype
        and given.shape == theirs.shape
        and float((given.double() - theirs).norm()) <= TOLERANCE[dtype] * float(theirs.norm())
        for given, theirs in zip(mine, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_kernels_of_activations(kind: str, dtype: torch.dtype) -> None:
    before, inward, d_back = (x.to(dtype) for x in inner(kind))
    wide = [x.double() for x in (before, inward, d_back)]
    assert near(triton.active(before, kind), op.active(wide[0], kind), dtype)
    assert near(triton.returned(before, inward, None, kind), op.returned(wide[0], wide[1], None, kind), dtype)
    assert near(triton.returned(before, inward, d_back, kind), op.returned(*wide, kind), dtype)
    assert near(triton.second(before, inward, d_back, kind), op.second(*wide, kind), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "targets", "adds"), [(K, 1, True), (K, N, False), (1, N, False)])
def test_kernels_of_errors(width: int, targets: int, adds: bool, dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) for name, x in sides(width, targets).items()}
    wide = {name: x.double() for name, x in given.items()}
    for form in (given, wide):
        form["all"] = [form["heard"], form["target"], form["key"] if adds else None, form["weights"]]  # type: ignore[assignment]
    assert near(triton.errors(*given["all"]), op.errors(*wide["all"]), dtype)
    later = ("later", "heard", "weights", "through")
    assert near(triton.of_errors(*(given[x] for x in later)), op.of_errors(*(wide[x] for x in later)), dtype)


def test_flows_by_operators_are_those_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of all three functions, with kernels where a GPU would run them."""
    for kind in ACTIVATIONS:
        wide = 2 * M if kind == "swiglu" else M
        net = Net(0.3 * numbers(B, H, N, wide, K), 0.3 * numbers(B, H, N, K, M))
        given = [*net, numbers(B, H, C, K), numbers(B, H, 1, C, K), numbers(B, H, C, 3), *numbers(2, B, H, C).unbind()]
        found = []
        for form in ("torch", "operators"):
            leaves = [x.float().requires_grad_() for x in given]
            if form == "operators":
                monkeypatch.setattr(lean, "glue_for", lambda x, activation: interpreted(activation))
            first, second = gathered(Net(*leaves[:2]), *leaves[2:5], leaves[5:], kind)
            outputs = [first, *second, read(Net(*leaves[:2]), leaves[2], kind)]
            own = self_taught(Net(*leaves[:2]), leaves[2], leaves[3].squeeze(2), leaves[4], leaves[5], leaves[5:], kind)
            outputs += [own[0], *own[1]]
            loss = sum((x * numbers(*x.shape, seed=9).float()).sum() for x in outputs)
            found.append([*outputs, *torch.autograd.grad(loss, leaves)])
        monkeypatch.undo()
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)


def interpreted(kind: str) -> glue.Glue:
    """What CUDA tensors would go to."""
    on_gpu: dict[str, Callable[..., Any]] = {
        name: getattr(op, name)._backend_fns["cuda"] for name in ("active", "returned", "second", "errors", "of_errors")
    }
    return glue.Glue(
        lambda before: on_gpu["active"](before, kind),
        lambda before, inward: on_gpu["returned"](before, inward, None, kind),
        lambda before: (on_gpu["active"](before, kind), before),
        lambda rise, inward: on_gpu["returned"](rise, inward, None, kind),
        lambda before, inward, d_back: Second(*on_gpu["second"](before, inward, d_back, kind), before),
        lambda kept, d_active, bent: on_gpu["returned"](kept, d_active, bent, kind),
        on_gpu["errors"],
        on_gpu["of_errors"],
    )


def test_operators_are_well_formed() -> None:
    given, checks = sides(), ("test_schema", "test_faketensor")
    for kind in ACTIVATIONS:
        before, inward, d_back = inner(kind)
        torch.library.opcheck(op.active, (before, kind), test_utils=checks)
        torch.library.opcheck(op.returned, (before, inward, d_back, kind), test_utils=checks)
        torch.library.opcheck(op.second, (before, inward, d_back, kind), test_utils=checks)
    said = torch.library.opcheck(
        op.errors, (given["heard"], given["target"], given["key"], given["weights"]), test_utils=checks
    )
    later = tuple(given[name] for name in ("later", "heard", "weights", "through"))
    assert torch.library.opcheck(op.of_errors, later, test_utils=checks).keys() == said.keys() == set(checks)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_compiles_whole(kind: str) -> None:
    wide = 2 * M if kind == "swiglu" else M
    up, down = (0.3 * numbers(B, H, N, wide, K)).requires_grad_(), (0.3 * numbers(B, H, N, K, M)).requires_grad_()
    given, weights = (
        (numbers(B, H, C, K), numbers(B, H, 1, C, K), numbers(B, H, C, 3)),
        list(numbers(2, B, H, C).unbind()),
    )

    def run(up: Tensor, down: Tensor) -> Tensor:
        first, second = gathered(Net(up, down), *given, weights, kind)
        return first.square().sum() + second[0].square().sum() + read(Net(up, down), given[0], kind).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(up, down), run(up, down))
    mine, theirs = (torch.autograd.grad(form(up, down), (up, down)) for form in (compiled, run))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: op.active(numbers(2, 3), "relu"), "no activation relu; choose of silu, gelu, swiglu"),
        (lambda: op.active(numbers(2, 3), "swiglu"), "halves 3 columns"),
        (lambda: op.active(numbers(2, 3).int(), "silu"), "before is torch.int32"),
        (lambda: op.returned(numbers(2, 3), numbers(2, 4), None, "silu"), "inward is torch.float64 \\(2, 4\\)"),
        (
            lambda: op.returned(numbers(2, 3), numbers(2, 3), numbers(1, 3), "silu"),
            "beside is torch.float64 \\(1, 3\\)",
        ),
        (lambda: op.errors(numbers(2, 3), numbers(2, 3), None, numbers(2)), "it takes \\(B, H, N, C, O\\)"),
        (lambda: read(Net(numbers(1, 1, 1, 3, 2), numbers(1, 1, 1, 2, 3)), numbers(1, 1, 2, 2), "tanh"), "tanh"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
