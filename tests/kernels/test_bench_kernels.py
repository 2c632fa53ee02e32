"""The table of kernels: every contestant runs, what is counted is what is done, and README has a place for each row."""

import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nlscale_kernels.mlp_memory.reference import Net, gathered
from nlscale_kernels.newton_schulz import reference
from torch.nn.attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from nlscale.bench import kernels as bench
from nlscale.bench import memory_kernels, peers, weight_kernels
from nlscale.bench.table import Row
from nlscale.model import block_mask
from nlscale.testing import ranks

KINDS = ("level_step", "X X^T", "Newton-Schulz", "delta rule", "DGD", "HOPE's memory", "SwiGLU memory", "SwiGLU units")
KINDS += ("memories' weights", "attention in documents")


def small() -> list[Row]:
    """The tables, on this machine."""
    patch = pytest.MonkeyPatch()
    patch.setattr(peers, "find_spec", lambda package: None)
    patch.setattr(block_mask, "compiled", lambda: flex_attention.flex_attention)
    patch.setattr(flex_attention, "_validate_device", lambda *_: None)  # which refuses gradients on a CPU
    return [row for found in bench.tables(5000, 16, "cpu", bench.on_cpu) for row in found]


def test_the_bench_runs_its_contestants() -> None:
    """And README has a place for each, with its target. In a process of its own, as in tests/model/test_block_mask.py."""
    (rows,) = ranks(1, small)
    assert len(rows) == 64 and all(row.value > 0 and (row.ratio or "operations" in row.name) for row in rows)
    table = Path("README.md").read_text().split("| on one GPU | measured | target |")[1].split("## Layout")[0]
    lines = [line.split("|")[1:4] for line in table.splitlines() if "not measured" in line]
    for kind in KINDS:
        assert any(kind in row.name for row in rows) and any(kind in line[0] for line in lines), kind
    assert all(any(kind in row.name for kind in KINDS) for row in rows)
    wanted = {float(row.target.strip(">=x ")) for row in rows if row.target != "-"}
    told = {float(each) for line in lines for each in re.findall(r"\d+(?:\.\d+)?", line[2])}
    assert (
        told - wanted == {0.95, 0.91, 1.4, 1.1, 0.45, 0.58, 0.85} and wanted <= told
    )  # of other libraries, larger sizes


def test_a_call_is_timed_behind_as_many_flushes_as_hide_its_launches() -> None:
    assert bench.hiding(1e-4, 8e-5) == bench.FLUSHES and bench.hiding(math.inf, 8e-5) == bench.MOST_FLUSHES
    assert bench.hiding(5e-3, 8e-5) == 93


def test_multiplications_of_a_write_are_counted() -> None:
    """SwiGLU memories of 4 heads, as the bench has them."""
    net = Net(torch.randn(4, 1, 1, 16, 8), torch.randn(4, 1, 1, 8, 8))
    key, target, weight = torch.randn(4, 1, 32, 8), torch.randn(4, 1, 1, 32, 8), torch.randn(4, 1, 32)
    with FlopCounterMode(display=False) as counter:
        gathered(net, key, target, key, [weight], "swiglu")
    assert counter.get_total_flops() == 2 * memory_kernels.multiplications(4, 32, 8)


def test_the_bench_gives_flash_linear_attention_what_it_takes() -> None:
    """As in tests/kernels/test_fla.py, a form of its published rule stands for it."""
    seen = {}

    def kernel(**given: object) -> tuple[torch.Tensor, torch.Tensor]:
        seen.update(given)
        return given["v"], given["initial_state"]  # type: ignore[return-value]

    forward, both = memory_kernels.by_fla(memory_kernels.Shape(2, 3, 128, 8), "cpu", kernel)
    o, state = forward()
    assert seen["k"].shape == (2, 128, 3, 8) and seen["g"].shape == seen["beta"].shape == (2, 128, 3)
    assert bool((seen["g"] <= 0).all()) and o.shape == (2, 3, 128, 8) and state.shape == (2, 3, 8, 8)
    assert not o.requires_grad and [x is not None for x in both()] == [
        False,
        False,
        True,
        False,
        True,
    ]  # of v and decay


def test_a_mean_step_counts_how_often_levels_are_due() -> None:
    assert weight_kernels.mean_step([1.0, 2.0, 3.0, 4.0]) == (48 * 1 + 12 * 2 + 3 * 3 + 4) / 64


def test_multiplications_of_an_orthogonalisation_are_counted() -> None:
    """With both halves of symmetric products, as torch multiplies them, there are more: those that are not done."""
    for rows, columns in ((8, 8), (8, 32)):
        with FlopCounterMode(display=False) as counter:
            reference.direct(torch.randn(1, rows, columns), weight_kernels.ITERATIONS)
        halves = weight_kernels.ITERATIONS * (rows**2 * columns + rows**3) // 2
        straight, _ = reference.multiplications(rows, columns, weight_kernels.ITERATIONS)
        assert counter.get_total_flops() == 2 * (straight + halves)


class Theirs:
    """What stands for other libraries, with the signatures of the versions that are named; it notes what it is given."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def gemm_symmetric(
        self, A: torch.Tensor, B: torch.Tensor, C: None = None, out: None = None, alpha: float = 1.0, beta: float = 1.0
    ) -> torch.Tensor:
        self.seen["product"] = A @ B
        return self.seen["product"]

    def gram(
        self,
        ns_epsilon: float = 1e-7,
        ns_use_kernels: bool = True,
        ns_coefficients: list[list[float]] | None = None,
        use_gram_newton_schulz: bool = True,
        gram_newton_schulz_reset_iterations: list[int] | None = None,
        compile_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        assert compile_kwargs == {"fullgraph": True, "dynamic": False} and gram_newton_schulz_reset_iterations == [2]
        self.seen["coefficients"] = ns_coefficients
        return lambda x: reference.direct(x, len(ns_coefficients or ()))

    def fused_adam(
        self,
        params: list[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        adam_w_mode: bool = True,
        master_weights: bool = False,
    ) -> torch.optim.Optimizer:
        assert adam_w_mode and master_weights and params[0].grad is not None
        self.seen["weights"] = params[0]
        return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def swiglu_backward(
        self, a: torch.Tensor, b: torch.Tensor, dc: torch.Tensor, gate_multiplier: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert a.shape == b.shape == dc.shape and a.is_contiguous() and b.is_contiguous()
        return a, b


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Theirs:
    """All of them as installed."""
    stand = Theirs()
    given = {
        "transformer_engine.pytorch.optimizers": {"FusedAdam": stand.fused_adam},
        "quack.gemm_interface": {"gemm_symmetric": stand.gemm_symmetric},
        "gram_newton_schulz": {"GramNewtonSchulz": stand.gram},
        "liger_kernel.ops.swiglu": {"swiglu_backward": stand.swiglu_backward},
    }
    for name, functions in given.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:depth]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for function, form in functions.items():
            setattr(module, function, form)
    monkeypatch.setattr(peers, "find_spec", lambda package: object())
    return stand


def test_other_libraries_stand_in_the_table_where_they_are(theirs: Theirs) -> None:
    square = weight_kernels.symmetric(16, "cpu", bench.on_cpu, 1e9)
    wide = weight_kernels.orthogonalisation(16, 4, "cpu", bench.on_cpu, 1e9)
    steps = weight_kernels.levels(5000, "cpu", bench.on_cpu)
    between = memory_kernels.between_products(5000, "cpu", bench.on_cpu)
    named = {row.name: row.target for rows in (square, wide, steps, between) for row in rows}
    assert named["X X^T 16, quack / own"] == named["Newton-Schulz 16 x 64, gram-newton-schulz / own"] == ">= 0.85x"
    assert named["level_step, TransformerEngine's FusedAdam / own"] == ">= 1x"
    assert named["derivative of SwiGLU units, liger-kernel / own"] == ">= 1x"
    assert torch.equal(theirs.seen["product"], theirs.seen["product"].mT)
    assert theirs.seen["coefficients"] == [list(reference.QUINTIC)] * weight_kernels.ITERATIONS
    assert theirs.seen["weights"].dtype == torch.bfloat16


def test_a_library_that_does_not_run_is_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> peers.Contestant:
        raise RuntimeError("no kernel image")

    assert peers.usable("torch", make) == [] and peers.usable("no_such_package", make) == []
    assert capsys.readouterr().out == "torch is installed and does not run here: RuntimeError: no kernel image\n"


@pytest.mark.parametrize(("gigabytes", "power"), [(148, 30), (118, 30), (84, 29), (40, 28)])
def test_as_many_weights_move_as_there_is_memory_for(
    gigabytes: int, power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all contestants at once: master, gradients, moments, copies, two optimizers of torch, and others' own."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gigabytes * 10**9 + 2 * 10**8, 0))
    assert bench.elements_here() == 2**power
