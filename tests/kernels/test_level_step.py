"""level_step: the reference against torch's optimizer and the equations; the kernels, interpreted, against the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nlscale_kernels import level_step
from nlscale_kernels.level_step import BLOCK, AdamW, Descend, Momenta, op, reference, table, triton
from torch import Tensor

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
PERIODS = (1, 2, 4)
ODD = 3 * BLOCK + 77  # elements: the last block is ragged


def numbers(seed: int, dtype: torch.dtype = torch.float32, elements: int = ODD) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(elements, generator=generator, dtype=torch.float64).to(dtype)


def near(given: Tensor, expected: Tensor, relative: float) -> None:
    assert float((given.double() - expected.double()).norm()) <= relative * float(expected.double().norm())


def poisoned(dtype: torch.dtype) -> Tensor:
    return torch.full((ODD,), float("nan"), dtype=dtype)


def test_reference_is_torchs_adamw() -> None:
    """Level by level, over its own moves, in float64."""
    blocks = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    master, first, second = numbers(0, torch.float64), numbers(1) * 0.0, numbers(1) * 0.0
    first, second, window = first.double(), second.double(), torch.zeros(ODD, dtype=torch.float64)
    spans = [slice(0, BLOCK), slice(BLOCK, 3 * BLOCK), slice(3 * BLOCK, ODD)]
    theirs = [torch.nn.Parameter(master[span].clone()) for span in spans]
    optimizers = [
        torch.optim.AdamW([each], lr=0.02 * period, betas=BETAS, eps=EPS, weight_decay=DECAY)
        for each, period in zip(theirs, PERIODS, strict=True)
    ]
    for step in range(1, 8):
        window += numbers(step, torch.float64)
        rows = []
        for period, span, each, optimizer in zip(PERIODS, spans, theirs, optimizers, strict=True):
            due = step % period == 0
            rows.append(AdamW.at(step // period, 0.02 * period, BETAS, EPS, DECAY, 1 / period) if due else AdamW.rest())
            if due:
                each.grad = window[span] / period
                optimizer.step()
        old, copy = master.clone(), torch.zeros(ODD)
        told = reference.adamw(master, window, first, second, copy, table(rows, master), blocks, clear=True)
        torch.testing.assert_close(master, torch.cat([each.detach() for each in theirs]), rtol=1e-12, atol=1e-14)
        for block in range(4):
            span = slice(block * BLOCK, min((block + 1) * BLOCK, ODD))
            moved = rows[int(blocks[block])].fire
            torch.testing.assert_close(told[block], (master - old)[span].square().sum(), rtol=1e-9, atol=1e-20)
            assert moved == float((window[span] == 0).all())
            assert not moved or torch.equal(copy[span], master[span].float())


def test_reference_momenta_are_their_equations() -> None:
    gradient, momentum, total, slow = (numbers(i, torch.float64) for i in range(4))
    before = [each.clone() for each in (momentum, total, slow)]
    for fires in (0.0, 1.0):
        rows = [Momenta(1.0, 0.5, 0.9, 0.1, fires, 0.8, 0.05)]
        reference.momenta(gradient, momentum, total, slow, table(rows, momentum))
        m, t, s = before
        m, t = 0.9 * m + 0.05 * gradient, t + 0.5 * gradient
        before = [m, t * (1 - fires), 0.8 * s + 0.05 * t if fires else s]
        for given, expected in zip((momentum, total, slow), before, strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-14)


def test_reference_descends() -> None:
    master, direction = numbers(0, torch.float64), numbers(1, torch.float64)
    expected = (1 - 0.02 * 0.1) * master - 0.02 * direction
    told = reference.descend(master, direction, None, table([Descend(1.0, 0.02, 0.1)], master))
    torch.testing.assert_close(master, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(told.sum(), (expected - numbers(0, torch.float64)).square().sum(), rtol=1e-9, atol=0)


ROWS = [AdamW.at(3, 0.02, BETAS, EPS, DECAY, 0.25), AdamW.rest(), AdamW.at(1, 0.05, (0.8, 0.9), 1e-6, 0.0)]
BLOCKS = torch.tensor([2, 0, 1, 0], dtype=torch.int32)


def both(name: str, make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
    """Arguments after the kernel and after the reference in float64, and what both give."""
    mine, theirs = make(), make()
    kept = {key: value.dtype for key, value in theirs.items() if isinstance(value, Tensor)}
    wide = {
        key: value.double() if key in kept and key not in ("blocks", "copy") else value for key, value in theirs.items()
    }
    return mine, wide, getattr(triton, name)(**mine), getattr(reference, name)(**wide)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_adamw_kernel(narrow: torch.dtype, blocks: Tensor | None) -> None:
    def make() -> dict[str, Any]:
        master = numbers(0)
        return {
            "master": master,
            "gradient": numbers(1, narrow),
            "first": numbers(2),
            "second": numbers(3).abs(),
            "copy": poisoned(narrow),
            "table": table(ROWS, master),
            "blocks": blocks,
            "clear": True,
        }

    mine, wide, told, expected = both("adamw", make)
    for name in ("master", "first", "second"):
        near(mine[name], wide[name], 1e-6)
    near(told, expected, 1e-5)
    assert torch.equal(mine["gradient"] == 0, wide["gradient"] == 0)
    moved = torch.ones(ODD, dtype=torch.bool) if blocks is None else (blocks != 1).repeat_interleave(BLOCK)[:ODD]
    assert torch.equal(mine["copy"].isnan(), ~moved)
    near(mine["copy"][moved], wide["master"][moved], {torch.float32: 1e-6, torch.bfloat16: 6e-3}.get(narrow, 6e-4))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("slow_fires", [0.0, 1.0])
def test_momenta_kernel(kept: bool, slow_fires: float) -> None:
    rows = [
        Momenta(1.0, 0.5, 0.9, 0.1, slow_fires, 0.8, 0.05),
        Momenta(0.0, 1.0, 0.5, 1.0),
        Momenta(1.0, 1.0, 0.95, 1.0),
    ]

    def make() -> dict[str, Any]:
        momentum = numbers(1)
        slow = {"total": numbers(2), "slow": numbers(3)} if kept else {"total": None, "slow": None}
        given = {"gradient": numbers(0), "momentum": momentum, **slow, "table": table(rows, momentum)}
        return {**given, "blocks": BLOCKS, "clear": False}

    mine, wide, _, _ = both("momenta", make)
    for name in ("momentum", *(("total", "slow") if kept else ())):
        near(mine[name], wide[name], 1e-6)
    assert torch.equal(mine["momentum"][2 * BLOCK : 3 * BLOCK], numbers(1)[2 * BLOCK : 3 * BLOCK])


def test_descend_kernel() -> None:
    rows = [Descend(1.0, 0.02, 0.1), Descend(0.0, 1.0, 1.0), Descend(1.0, 0.5, 0.0)]

    def make() -> dict[str, Any]:
        master = numbers(0)
        given = {"master": master, "direction": numbers(1, torch.float16), "copy": poisoned(torch.float32)}
        return {**given, "table": table(rows, master), "blocks": BLOCKS}

    mine, wide, told, expected = both("descend", make)
    near(mine["master"], wide["master"], 1e-6)
    near(told, expected, 1e-5)
    assert int(mine["copy"].isnan().sum()) == BLOCK


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    master, first, second = numbers(0, dtype), numbers(1, dtype), numbers(2, dtype).abs()
    rows = table([AdamW.at(1, 0.1, BETAS, EPS, DECAY)], master)
    return {"master": master, "gradient": numbers(3), "first": first, "second": second, "copy": None, "table": rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_well_formed(dtype: torch.dtype) -> None:
    given = arguments(dtype)
    master, copy = given["master"], poisoned(torch.bfloat16)
    momenta, descend = table([Momenta(1.0, 1.0, 0.9, 0.1)], master), table([Descend(1.0, 0.1, 0.0)], master)
    checks = [
        torch.library.opcheck(op.adamw, tuple(given.values())),
        torch.library.opcheck(op.adamw, (*tuple(given.values())[:4], copy, given["table"], None, True)),
        torch.library.opcheck(op.momenta, (numbers(0), master, None, None, momenta)),
        torch.library.opcheck(op.descend, (master, numbers(0), None, descend)),
    ]
    assert all(set(each.values()) == {"SUCCESS"} for each in checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_gpu_runs_is_checked_and_is_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that is registered for GPUs, interpreted; float64 goes to the reference."""
    on_gpu, mine, theirs = op.adamw._backend_fns["cuda"], arguments(dtype), arguments(dtype)
    called = []
    for form in (triton, reference):
        plain = form.adamw
        monkeypatch.setattr(
            form, "adamw", lambda *a, form=form, plain=plain, **k: called.append(form) or plain(*a, **k)
        )
    on_gpu(*mine.values())
    reference.adamw(**theirs)
    assert called[0] is (reference if dtype == torch.float64 else triton)
    near(mine["master"], theirs["master"], 1e-6)
    with pytest.raises(ValueError, match="first has shape"):
        on_gpu(*(mine | {"first": mine["first"][:5]}).values())


def test_compiles_whole() -> None:
    def step(given: dict[str, Any]) -> Tensor:
        return level_step.adamw(**given).sum()

    compiled, plain = arguments(), arguments()
    said = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(said, step(plain)) and torch.equal(compiled["master"], plain["master"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first": numbers(1)[:5]}, "first has shape"),
        ({"gradient": numbers(1).to(torch.int32)}, "gradient is torch.int32"),
        ({"second": numbers(1, torch.bfloat16)}, "second is torch.bfloat16"),
        ({"master": numbers(0, torch.bfloat16)}, "master is torch.bfloat16"),
        ({"master": numbers(0, elements=2 * ODD)[::2]}, "contiguous"),
        ({"table": torch.zeros(1, 3)}, "9 columns"),
        (
            {"blocks": torch.zeros(2, dtype=torch.int32)},
            r"blocks is torch.int32 \(2,\) on cpu; it must be torch.int32 \(4,\) on cpu",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        level_step.adamw(**(arguments() | change))
