"""memory_step: its gradients written out against autograd's, the kernels, interpreted, against both."""

from typing import Any

import pytest
import torch
from nlscale_kernels.mlp_memory import Step, moved, step, triton
from torch import Tensor

B, H, N, O, I = 2, 2, 2, 7, 11  # noqa: E741
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def given(kind: str, limit: float) -> Step:
    """`turned`: as W2 moves; `kept`: as W1 moves and Titans' weights; `plain`: without momentum."""
    weights = [numbers(B, H, N, O, I, seed=seed) for seed in range(4)]
    keep, carry, left = (torch.sigmoid(numbers(B, H, seed=seed)) for seed in (4, 5, 6))
    state, speed, written, held = weights
    return {
        "turned": Step(state, speed, written, None, None, carry, None, 1.0, limit),
        "kept": Step(state, speed, written, held, keep, carry, left, -1.0, limit),
        "plain": Step(state, None, written, None, keep, None, None, -1.0, limit),
    }[kind]


KINDS, LIMITS = ("turned", "kept", "plain"), (0.0, 10.7, 1e3)
WAYS = [pytest.param(kind, limit, id=f"{kind}-{limit:g}") for kind in KINDS for limit in LIMITS]


def cast(this: Step, dtype: torch.dtype) -> Step:
    return Step._make(x.to(dtype) if isinstance(x, Tensor) else x for x in this)


def ends(this: Step) -> tuple[Tensor, Tensor]:
    later = numbers(B, H, N, O, I, seed=9) if this.speed is not None else torch.zeros(0, dtype=torch.float64)
    return numbers(B, H, N, O, I, seed=8), later


def test_a_step_is_its_formula() -> None:
    this = given("kept", 10.7)
    add = this.carry[..., None, None, None] * this.speed - this.written
    share = (10.7 / add.square().sum((-2, -1), keepdim=True).sqrt()).clamp(max=1)
    assert 0 < int((share < 1).sum()) < share.numel()
    after, then = step.stepped(this)
    torch.testing.assert_close(after, this.keep[..., None, None, None] * this.state + share * add)
    torch.testing.assert_close(then, share * (this.left[..., None, None, None] * this.speed - this.held))
    alike = step.stepped(given("turned", 0.0))
    torch.testing.assert_close(alike[0] - given("turned", 0.0).state, alike[1])


@pytest.mark.parametrize(("kind", "limit"), WAYS)
def test_gradients_written_out_are_autograds(kind: str, limit: float) -> None:
    this = given(kind, limit)
    names = [name for name in step.Moved._fields if getattr(this, name) is not None]
    leaves = {name: getattr(this, name).requires_grad_() for name in names}
    after, then = step.stepped(this)
    outputs = [after] if then is None else [after, then]
    expected = torch.autograd.grad(outputs, list(leaves.values()), ends(this)[: len(outputs)])
    with torch.no_grad():
        mine = step.gradients(this, *ends(this))
    for name, theirs in zip(names, expected, strict=True):
        torch.testing.assert_close(getattr(mine, name), theirs, rtol=1e-9, atol=1e-11)
    assert all(not getattr(mine, name).numel() for name in set(step.Moved._fields) - set(names))


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize(("kind", "limit"), WAYS)
def test_on_a_cpu_gradients_come_of_what_is_left(kind: str, limit: float, rows: int) -> None:
    """`moved` keeps neither what was written nor what was added; a state that all rows share gets their sum."""
    whole = given(kind, limit)
    this = whole._replace(state=whole.state[:rows], speed=None if whole.speed is None else whole.speed[:rows])
    leaves = [x.requires_grad_() for x in this if isinstance(x, Tensor)]
    found = []
    for form in (moved, step.stepped):
        outputs = [x for x in form(this) if x is not None]
        slopes = torch.autograd.grad(outputs, leaves, ends(whole)[: len(outputs)], create_graph=True)
        bends = torch.autograd.grad(sum(each.square().sum() for each in slopes), leaves, allow_unused=True)
        found.append([*outputs, *slopes, *(torch.zeros(()) if x is None else x for x in bends)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs.expand_as(mine).to(mine.dtype), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kind", "limit"), WAYS)
def test_kernels(kind: str, limit: float, dtype: torch.dtype, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of 77 elements as one slice, and as three whose norm is found before."""
    monkeypatch.setattr(triton, "SLICE", {1: 96, 3: 32}[slices])
    this = cast(given(kind, limit), dtype)
    d_after, d_then = (x.to(dtype) for x in ends(this))
    exact = cast(this, torch.float64)
    after, then = step.stepped(exact)
    expected = [after, then if then is not None else d_then, *step.gradients(exact, d_after.double(), d_then.double())]
    mine = [*triton.stepped(this), *triton.step_gradients(this, d_after, d_then)]
    for name, found, theirs in zip(("after", "then", *step.Moved._fields), mine, expected, strict=True):
        assert found.shape == theirs.shape and found.isfinite().all(), name
        error = float((found.double() - theirs.double()).norm())
        assert error <= TOLERANCE[dtype] * float(theirs.double().norm()), name


@pytest.mark.parametrize("kind", KINDS)
def test_operator_is_well_formed_and_twice_differentiable(kind: str) -> None:
    this = Step._make(x.requires_grad_() if isinstance(x, Tensor) else x for x in given(kind, 10.7))
    torch.library.opcheck(step.forward, tuple(this))

    def run(*tensors: Tensor) -> Any:
        left = iter(tensors)
        found = step.forward(*(next(left) if isinstance(x, Tensor) else x for x in this))
        return found if this.speed is not None else found[0]

    leaves = [x for x in this if isinstance(x, Tensor)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_what_a_gpu_runs_and_what_is_compiled_are_the_same() -> None:
    this = cast(given("kept", 10.7), torch.float32)
    for mine, theirs in zip(step.forward._backend_fns["cuda"](*this), step.stepped(this), strict=True):
        torch.testing.assert_close(mine, theirs)
    of = tuple(x.float() for x in ends(this))
    found = step.backward._backend_fns["cuda"](*this, *of)
    for mine, theirs in zip(found, step.gradients(this, *of), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    shared = this._replace(state=this.state[:1], speed=this.speed[:1])  # rows that begin alike
    compiled = torch.compile(moved, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(shared), moved(shared), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"written": numbers(B, H, N, O)}, "it takes \\(B, H, N, O, I\\)"),
        ({"keep": numbers(B, N + 1)}, "keep is"),
        ({"carry": None}, "speed and carry go together"),
        ({"held": None}, "held and left go together"),
        ({"speed": None, "carry": None}, "held needs speed"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        step.forward(*given("kept", 0.0)._replace(**change))
