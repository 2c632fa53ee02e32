"""Attention by blocks of a mask: the blocks are those of the dense mask, and a model learns the same by both.

Where torch compiles it is a GPU (tests/gpu/test_attention.py); here its own plain form of the same operator runs.
"""

from types import SimpleNamespace

import pytest
import torch
from nlscale_kernels.switch import kernels
from torch import Tensor
from torch.nn.attention import flex_attention

from nlscale.model import block_mask as by_blocks
from nlscale.model import scene
from nlscale.model.attention import by_math, flash
from nlscale.parallel import apply
from nlscale.testing import ranks
from tests.optim.driver import built, usual
from tests.tiny import tiny

ROWS, TOKENS = 2, 512
STARTS = {
    "no documents": None,
    "one each": torch.zeros(ROWS, TOKENS, dtype=torch.bool),
    **{
        f"{share:.1%}": torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(1)) < share
        for share in (0.3, 0.004)
    },
    "at blocks": torch.arange(TOKENS).remainder(by_blocks.BLOCK).eq(0).expand(ROWS, TOKENS),
}


@pytest.mark.parametrize("window", [None, 1, 128, 129, 200, 300, 1000])
@pytest.mark.parametrize("documents", STARTS)
def test_blocks_are_those_of_the_dense_mask(documents: str, window: int | None) -> None:
    starts = STARTS[documents]
    seen = scene.allowed(TOKENS, starts, window, 0, torch.device("cpu"))
    found = by_blocks.block_mask(TOKENS, starts, window, torch.device("cpu"))
    assert torch.equal(by_blocks.dense(found), seen)

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[row, 0, query, key]

    wanted = flex_attention.create_block_mask(mask, seen.shape[0], None, TOKENS, TOKENS, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, listed = (
            [getattr(each, f"{kind}_{what}") for each in (found, wanted)] for what in ("num_blocks", "indices")
        )
        assert torch.equal(*counts), kind
        there = torch.arange(TOKENS // by_blocks.BLOCK) < counts[0][..., None]
        assert torch.equal(*(each.where(there, -1) for each in listed)), kind


def plainly(patch: pytest.MonkeyPatch) -> None:
    """Has this process go by blocks of 8 tokens, without a compiler and on the CPU."""
    patch.setattr(by_blocks, "BLOCK", 8)
    patch.setattr(by_blocks, "compiled", lambda: flex_attention.flex_attention)
    patch.setattr(flex_attention, "_validate_device", lambda *_: None)  # which refuses gradients on a CPU
    patch.setattr(scene, "takes", lambda table, past: table.shape[0] % 8 == 0 and past == 0)


def products() -> list[tuple[Tensor, ...]]:
    """Outputs and gradients by blocks, by all weights, and by the dense mask."""
    plainly(pytest.MonkeyPatch())
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 32, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, 32, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    starts = torch.rand(2, 32, generator=generator) < 0.1
    mask = by_blocks.block_mask(32, starts, 12, q.device)
    found = []
    for product, given in ((flash, mask), (by_math, mask), (flash, by_blocks.dense(mask))):
        o = product(q, k, v, given)
        found.append((o.detach(), *torch.autograd.grad(o.square().sum(), (q, k, v))))
    return found


def test_all_products_are_equal() -> None:
    """In a process of its own: from one where flex attention has gone backward, torch 2.11 cannot fork."""
    ((*others, wanted),) = ranks(1, products)
    for found in others:
        for mine, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


def learnt(overrides: list[str], blocks: bool) -> tuple[list[float], int]:
    """Losses of four steps; and calls that went by blocks."""
    apply.BACKEND, calls = "aot_eager", [0]
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            plainly(patch)
        inner = scene.block_mask

        def counted(*given: object) -> object:
            calls[0] += 1
            return inner(*given)

        patch.setattr(scene, "block_mask", counted)
        run = tiny("model.layers=2", "data.sequence=32", "train.evaluate_rows=0", *overrides)
        world, model, optimizer = built(run)
        losses = []
        for step in range(1, 5):
            total = model.forward_backward(usual(run, step, world), True)
            optimizer.step(step, total[2].long())
            losses.append(float(total[0]))
    return losses, calls[0]


CASES = {
    "attention": (1, []),
    "window": (1, ["model.window=12"]),
    "window alone": (1, ["model.window=12", "model.attention=causal"]),
    "compiled": (1, ["train.compile=block", "model.layers=1"]),
    "recompute": (1, ["train.recompute=block"]),
    "tensor": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "context": (2, ["parallel.context=2"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "gate": (1, ["model.mixer=titans_mag", "model.titans.chunk=8", "model.window=12", "model.titans.persistent=0"]),
    "layer": (1, ["model.mixer=titans_mal", "model.titans.chunk=8", "model.window=12", "model.titans.persistent=0"]),
    "written": (1, ["model.mixer=written", "model.written.chunk=8"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_learns_the_same(case: str) -> None:
    count, overrides = CASES[case]
    for (plain, none), (mine, calls) in zip(
        ranks(count, learnt, overrides, False), ranks(count, learnt, overrides, True), strict=True
    ):
        assert mine == pytest.approx(plain, rel=2e-6) and not none and calls


@pytest.mark.parametrize("mixer", ["titans_mag", "titans_mal", "titans_mac"])
def test_tokens_beside_the_row_are_no_block_of_it(mixer: str) -> None:
    learned = [f"model.mixer={mixer}", "model.titans.chunk=8", "model.window=12", "model.titans.persistent=3"]
    (plain,), (mine,) = ranks(1, learnt, learned, False), ranks(1, learnt, learned, True)
    assert mine == plain and mine[1] == 0


def test_what_goes_by_blocks() -> None:
    def table(tokens: int, dtype: torch.dtype = torch.bfloat16, on_gpu: bool = True) -> SimpleNamespace:
        return SimpleNamespace(shape=(tokens, 1, 1, 8), is_cuda=on_gpu, element_size=lambda: dtype.itemsize)

    assert by_blocks.takes(table(256), 0) and by_blocks.takes(table(256, torch.float16), 0)
    assert not by_blocks.takes(table(256), 128) and not by_blocks.takes(table(200), 0)
    assert not by_blocks.takes(table(256, torch.float32), 0) and not by_blocks.takes(table(256, on_gpu=False), 0)
    with kernels("reference"):
        assert not by_blocks.takes(table(256), 0)
    assert by_blocks.takes(table(256), 0)


def test_other_rows_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, given: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(flex_attention.flex_attention, backend=backend, dynamic=False, fullgraph=True)
    monkeypatch.setattr(by_blocks, "compiled", lambda: compiled)
    q = torch.randn(ROWS, 2, TOKENS, 16, generator=torch.Generator().manual_seed(0))
    for starts in list(STARTS.values())[1:]:
        mask = by_blocks.block_mask(TOKENS, starts, 300, q.device)
        torch.testing.assert_close(flash(q, q, q, mask), flash(q, q, q, by_blocks.dense(mask)))
    assert len(graphs) == 1
