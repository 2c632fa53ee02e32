"""Blocks through torch.compile compute what they compute without; the bench of the ladder measures what it says."""

import json
import operator
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.backends.registry  # what compiles is imported once, not in every rank
import torch._inductor.compile_fx

from nlscale.bench import ladder, table
from nlscale.bench.ladder import Figures, measured, rows_of
from nlscale.bench.table import versions
from nlscale.config.errors import UserError
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.config.shapes import MIXERS
from nlscale.parallel import apply
from nlscale.testing import ranks
from tests.optim.driver import built, usual
from tests.sampled import sampled
from tests.tiny import tiny

CASES: dict[str, tuple[int, list[str]]] = {
    "attention": (1, []),
    "tensor": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "recompute": (1, ["train.recompute=block"]),
    "hope": (
        1,
        [
            "model.mixer=self_modifying",
            "model.self_modifying.chunk=8",
            "model.layers=1",
        ],
    ),
    "hope, both layers": (
        1,
        [
            "model.mixer=self_modifying",
            "model.self_modifying.per_layer=true",
            "model.self_modifying.chunk=8",
            "model.layers=1",
        ],
    ),
    "delta": (1, ["model.mixer=delta", "model.linear.chunk=4"]),
    "written": (1, ["model.mixer=written", "model.written.chunk=4", "model.layers=1"]),
}


def losses(backend: str, overrides: list[str]) -> tuple[list[float], int]:
    """Of four steps; and graphs that were compiled."""
    import torch._dynamo as dynamo

    apply.BACKEND = backend
    dynamo.utils.counters.clear()  # a forked rank has its parent's, who may have compiled for other tests
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    found = []
    for step in range(1, 5):
        total = model.forward_backward(usual(run, step, world), True)
        optimizer.step(step, total[2].long())
        found.append(float(total[0]))
    return found, dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("case", sampled(CASES, ("hope", "hope, both layers", "delta", "written")))
def test_compiled_blocks_compute_the_same(case: str) -> None:
    count, overrides = CASES[case]
    for (plain, none), (compiled, graphs) in zip(
        ranks(count, losses, "aot_eager", overrides),
        ranks(count, losses, "aot_eager", [*overrides, "train.compile=block"], timeout=250),
        strict=True,
    ):
        assert compiled == pytest.approx(plain, rel=1e-6) and none == 0 and graphs > 0


def test_machine_code_computes_the_same() -> None:
    ((plain, _),) = ranks(1, losses, "inductor", ["model.layers=1"])
    ((compiled, graphs),) = ranks(1, losses, "inductor", ["model.layers=1", "train.compile=block"], timeout=250)
    assert compiled == pytest.approx(plain, rel=1e-6) and graphs > 0


def given_back(overrides: list[str]) -> tuple[int, list[str]]:
    """How many functions with a backward of their own a compiled block calls, and which of them give a tensor that an
    operation was given (in_turn.anew).
    """
    called: list[str] = []
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> torch.fx.GraphModule:
        for node in graph.graph.nodes:
            if node.target is torch.ops.higher_order.autograd_function_apply:
                inner = graph.get_submodule(node.args[0].target)
                called.append(node.name)
                (output,) = (each for each in inner.graph.nodes if each.op == "output")
                results, _ = output.args[0]  # beside what is kept
                wanted = {user.args[1] for user in node.users if user.target is operator.getitem}
                for each in [results[i] for i in wanted]:
                    value, sources = each.meta.get("example_value"), each.all_input_nodes
                    if any(source.meta.get("example_value") is value for source in sources):
                        found.append(f"{node.name}: {each.format_node()}")
        return graph

    apply.BACKEND = backend  # type: ignore[assignment]
    run = tiny("model.layers=1", "train.compile=block", *overrides)
    world, model, _ = built(run)
    model.chunks[0](*usual(run, 1, world)[0])
    return len(called), found


PER_LAYER = "self_modifying model.self_modifying.per_layer=true"
LEFT = {*MIXERS, PER_LAYER} - {"attention", "delta", "self_modifying"}


@pytest.mark.parametrize("mixer", sampled([*MIXERS, PER_LAYER], LEFT))
def test_no_function_gives_what_torch_2_11_has_no_gradient_for(mixer: str) -> None:
    chunks = [f"model.{section}.chunk=8" for section in ("linear", "titans", "written", "self_modifying")]
    more = [*chunks, "model.self_modifying.maker_chunk=16", *f"model.mixer={mixer}".split()]
    ((called, found),) = ranks(1, given_back, more, timeout=200)
    assert not found and (called or mixer == "attention")


def kept(overrides: list[str]) -> tuple[float, int]:
    """The loss of a step, and the bytes that its forward pass keeps for backward."""
    apply.BACKEND = "aot_eager"
    run = tiny("model.layers=1", *overrides)
    world, model, _ = built(run)
    batch, held = usual(run, 1, world)[0], dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.chunks[0](*batch)
    loss.backward()
    return float(loss), sum(held.values())


def test_a_compiled_block_keeps_no_more_than_it_is_told_to() -> None:
    (most, little) = (
        ranks(1, kept, ["train.compile=block", f"train.activation_budget={share}"])[0] for share in (1.0, 0.4)
    )
    # Of equal cuts torch takes one or the other, from run to run: 0.76 or 0.83 of what is kept without a budget.
    assert most[0] == pytest.approx(little[0], rel=1e-6) and little[1] < 0.9 * most[1]


def test_the_ladder_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of this machine's size: MFU is tokens a second x FLOPs a token / peak, as told."""
    run = tiny("log.peak_flops=1e9", "train.micro_batch=4")
    (found,) = ranks(1, measured, run)
    from nlscale.model.count import flops_a_token

    assert found.mfu == pytest.approx(found.tokens_per_second * flops_a_token(run.model, run.levels, 16) / 1e9)
    assert found.tokens_per_second > 0 and found.peak_bytes > 2**20
    if not ladder.torch.cuda.is_available():
        with pytest.raises(UserError, match="bench ladder measures a GPU"):
            ladder.main(None)


def test_the_ladder_goes_on_where_a_size_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By doubles of the GPU and of what is measured there: what stands is on disk after each, and a failure is a miss. CUDA
    is not asked in this process, in whose forks it could not be used then.
    """
    target, this = tmp_path / "ladder.json", os.getpid()

    def name() -> str:
        assert os.getpid() != this
        return "a double"

    def run_on(count: int, function: Any, run: Run, *rest: Any, **options: Any) -> list[Any]:
        if function is not measured:
            return [(2.0**31, 0)]
        if run.train.compile == "block" and run.model.width == read("1.3b-plain").model.width:
            assert len(json.loads(target.read_text())["rows"]) >= 9, "what was measured before"
            raise RuntimeError("1 ranks ended with 1\nCUDA out of memory")
        return [Figures(1000.0, 0.6, 2**31)]

    for module in (ladder, table):
        monkeypatch.setattr(module, "gpu_here", lambda: True)
    monkeypatch.setattr(ladder, "ranks", run_on)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    table.gpu_name.cache_clear()
    assert ladder.main(str(target)) == 1
    table.gpu_name.cache_clear()
    said, written = capsys.readouterr().out, json.loads(target.read_text())
    rows = written["rows"]
    assert written["machine"]["gpu"] == "a double"
    assert [row["name"] for row in rows if not row["ok"]] == [
        f"1.3b-{variant}, compiled: failed" for variant in ladder.VARIANTS
    ]
    assert "1.3b-plain, compiled: CUDA out of memory" in said
    software = (
        f"torch {versions()['torch']}, megatron-core {versions()['megatron-core']}, triton {versions()['triton']}"
    )
    assert torch.__version__.startswith(versions()["torch"])  # which may leave out what it was built for
    when = f"a double, {software}, {datetime.now(UTC):%Y-%m-%d} |"
    assert f"| 1.3b-plain | 1,000, 60.0%, 2.0 | not measured | {when}" in said
    assert f"| 125m-hope | 1,000, 60.0%, 2.0 | 1,000, 60.0%, 2.0 | {when}" in said


def test_readme_has_a_row_for_everything_that_the_ladder_measures() -> None:
    told = Path("README.md").read_text()
    head, _, *rows = ladder.readme({(s, v, c): None for s in ladder.SIZES for v in ladder.VARIANTS for c in (0, 1)}, "")
    assert head in told and len(rows) == 12 and all(f"\n{row[: row.index('|', 2)]}|" in told for row in rows)


def test_targets_are_held() -> None:
    plain, slow = Figures(1000.0, 0.5, 2**30), Figures(600.0, 0.3, 2**31)

    def verdicts(*given: Any) -> list[bool]:
        return [row.ok for row in rows_of("x", *given)]

    assert verdicts(plain, 0.45, None, None) == [True, True, True] and verdicts(plain, 0.55, None, None)[0] is False
    assert verdicts(slow, None, plain, 1.5) == [True, False, True]
    assert verdicts(slow, None, plain, 1.7) == [True, True, True]
    assert rows_of("x", slow, None, plain, 1.7)[1].ratio == pytest.approx(1000 / 600)
    assert {name for name, _ in ladder.TARGETS} <= set(ladder.SIZES)
    assert ladder.configure("350m", "hope", True).train.compile == "block"
