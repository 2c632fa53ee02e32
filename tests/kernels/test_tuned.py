"""Configs come from committed files: the nearest shape's, else the first of the kernel's list."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nlscale_kernels import tune, tuned
from nlscale_kernels.mlp_memory.reference import Net, gathered
from nlscale_kernels.newton_schulz import reference, triton
from nlscale_kernels.self_modifying import triton as solve_kernels
from nlscale_kernels.self_modifying import triton_backward as walk_kernels
from nlscale_kernels.triton_build import Config
from nlscale_kernels.tuned import entries, file_of, nearest
from torch.utils.flop_counter import FlopCounterMode
from triton import OutOfResources

from nlscale.bench import kernels as bench
from nlscale.bench import memory_kernels

CONFIGS = [Config({"TILE": 128}, 8, 4), Config({"TILE": 64})]
KINDS = ("level_step", "X X^T", "Newton-Schulz", "delta rule", "DGD", "HOPE's memory", "SwiGLU memory", "SwiGLU units")
KINDS += ("memories' weights",)
KNOWN = [
    {"shape": {"rows": 1024}, "config": {"tiles": {"TILE": 64}, "warps": 4, "stages": 3}},
    {"shape": {"rows": 4096}, "config": {"tiles": {"TILE": 256}, "warps": 8, "stages": 3}},
    {"shape": {"columns": 100}, "config": {"tiles": {"TILE": 1}, "warps": 1, "stages": 1}},
]


def test_the_nearest_shape_as_ratios_go() -> None:
    assert nearest(KNOWN, CONFIGS, {"rows": 1900}) == Config({"TILE": 64}, 4, 3)
    assert nearest(KNOWN, CONFIGS, {"rows": 2300}) == Config({"TILE": 256}, 8, 3)
    assert nearest([], CONFIGS, {"rows": 2300}) == nearest(KNOWN, CONFIGS, {"depth": 1}) == CONFIGS[0]


def test_files_are_named_after_device_and_version(tmp_path: Path) -> None:
    assert file_of("NVIDIA H200", "3.6.0") == "nvidia_h200.triton36.json"
    (tmp_path / "a.json").write_text(json.dumps({"kernel": KNOWN}))
    assert entries("a.json", tmp_path)["kernel"] == KNOWN and entries("b.json", tmp_path) == {}


def test_a_device_too_small_for_every_config_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "device_facts", lambda index: ("NVIDIA A100", 80))
    device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match="walk: NVIDIA A100 is of sm_80, too small for its configs; it needs sm_90"):
        tuned.chosen("walk", [replace(CONFIGS[0], least=90)], device, rows=1)
    assert tuned.chosen("walk", [replace(CONFIGS[0], least=90), CONFIGS[1]], device, rows=1) == CONFIGS[1]


def test_tuning_takes_the_fastest_config_that_is_right() -> None:
    """Times are given, one config is wrong: the kernels run interpreted."""
    x = torch.randn(1, 40, 40, dtype=torch.float32)
    configs = [Config({"TILE": tile, "DEPTH": 32}) for tile in (16, 32, 64)]
    expected = reference.symmetric_product(x.double(), x.double())

    def run(config: Config) -> torch.Tensor:
        wrong = config.tiles["TILE"] == 64
        return triton.symmetric_product(x, x, config=config) + wrong

    times = iter((3.0, 2.0, 1.0))
    chosen = tune.best(configs, run, expected, lambda run: next(times))
    assert chosen == {"config": {"tiles": {"TILE": 32, "DEPTH": 32}, "warps": 4, "stages": 2}, "microseconds": 2000.0}
    assert tune.best(configs[2:], run, expected, lambda run: 1.0) is None
    assert tune.best(configs, lambda config: expected * float("nan"), expected, lambda run: 1.0) is None

    def too_large(config: Config) -> torch.Tensor:
        raise OutOfResources(300000, 200000, "shared memory")

    assert tune.best(configs, too_large, expected, lambda run: 1.0) is None
    found = tune.symmetric_products("cpu", [64], 80, lambda run: 1.0)
    assert found[0]["shape"] == {"rows": 64} and nearest(found, configs, {"rows": 64}).tiles.keys() == {"TILE", "DEPTH"}


def test_kernels_of_matrix_memory_are_tuned_one_by_one() -> None:
    """All seven are right, and the faster of their configs is written down."""
    times = iter(range(100))
    found = tune.matrix_memories("cpu", (1, 1, 32, 16), [16], 80, lambda run: float(next(times)))
    assert found.keys() == {f"matrix_memory.{name}" for name in (*tune.FORWARD, *tune.BACKWARD)}
    first = {f"matrix_memory.{name}": configs[0] for name, configs in (tune.FORWARD | tune.BACKWARD).items()}
    assert all(nearest(each, CONFIGS, {"width": 16}) == first[name] for name, each in found.items())


def test_the_way_back_through_the_solve_is_tuned() -> None:
    times = iter((2.0, 1.0))
    found = tune.solves("cpu", (1, 2, 24), [40], 90, lambda run: next(times))
    assert [each["shape"] for each in found] == [{"width": 40}]
    assert nearest(found, CONFIGS, {"width": 40}) == replace(solve_kernels.GRADIENT[1], least=80)


def test_every_kernel_with_several_configs_is_tuned() -> None:
    """What operators look up is what the tuned file says."""
    source = [path.read_text() for path in Path(tune.__file__).parent.rglob("*.py")]
    asked = {name for text in source for name in re.findall(r'(?:config_for|chosen)\("([\w.]+)"', text)}
    written = {f"matrix_memory.{name}" for name in (*tune.FORWARD, *tune.BACKWARD)}
    written |= {"symmetric_product", "reach.gradients", "resident.walk", "resident.gradients"}
    assert asked == written


def test_kernels_of_the_walk_are_tuned() -> None:
    times = iter((2.0, 1.0, 3.0, 4.0))
    found = tune.walks("cpu", (1, 1, 2, 16), [16], 90, lambda run: next(times))
    assert nearest(found["resident.walk"], CONFIGS, {"width": 16}) == replace(walk_kernels.FORWARD[1], least=80)
    assert nearest(found["resident.gradients"], CONFIGS, {"width": 16}) == replace(walk_kernels.BACKWARD[0], least=80)


def test_the_bench_runs_its_contestants() -> None:
    """And README has a place for each, with its target."""
    rows = [row for found in bench.tables(5000, 16, "cpu", bench.on_cpu) for row in found]
    assert len(rows) == 40 and all(row.value > 0 and (row.ratio or "operations" in row.name) for row in rows)
    table = Path("README.md").read_text().split("| on one GPU | measured | target |")[1].split("## Layout")[0]
    lines = [line.split("|")[1:4] for line in table.splitlines() if "not measured" in line]
    for kind in KINDS:
        assert any(kind in row.name for row in rows) and any(kind in line[0] for line in lines), kind
    assert all(any(kind in row.name for kind in KINDS) for row in rows)
    wanted = {float(row.target.strip(">=x ")) for row in rows if row.target != "-"}
    told = {float(each) for line in lines for each in re.findall(r"\d+(?:\.\d+)?", line[2])}
    assert told - wanted == {0.95, 0.91, 1.4, 1.1, 0.45, 0.58} and wanted <= told  # of fla and of larger sizes


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
    assert bench.mean_step([1.0, 2.0, 3.0, 4.0]) == (48 * 1 + 12 * 2 + 3 * 3 + 4) / 64
