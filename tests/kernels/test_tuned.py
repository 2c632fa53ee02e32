"""Configs come from committed files: the nearest shape's, else the first of the kernel's list."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nlscale_kernels import tune, tuned
from nlscale_kernels.newton_schulz import reference, triton
from nlscale_kernels.self_modifying import triton as solve_kernels
from nlscale_kernels.self_modifying import triton_backward as walk_kernels
from nlscale_kernels.self_modifying.resident import KERNELS
from nlscale_kernels.triton_build import Config
from nlscale_kernels.tuned import entries, file_of, nearest
from torch import Tensor
from triton import OutOfResources

CONFIGS = [Config({"TILE": 128}, 8, 4), Config({"TILE": 64})]
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
    written |= {"symmetric_product", "reach.gradients", *KERNELS}
    assert asked == written


def test_kernels_of_the_walk_are_tuned() -> None:
    times = iter((2.0, 1.0, 3.0, 4.0))
    found = tune.walks("cpu", (1, 1, 2, 16), [16], 90, lambda run: next(times))
    assert nearest(found["resident.walk"], CONFIGS, {"width": 16}) == replace(walk_kernels.FORWARD[1], least=80)
    assert nearest(found["resident.gradients"], CONFIGS, {"width": 16}) == replace(walk_kernels.BACKWARD[0], least=80)


def test_a_walk_that_is_wrong_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for another width either: a shape that is not in the file takes the nearest one's config."""
    right = walk_kernels.gradients

    def wrong(given: Any, *rest: Any) -> list[Tensor]:
        return [1.1 * x if given.q.shape[-1] == 32 else x for x in right(given, *rest)]

    monkeypatch.setattr(walk_kernels, "gradients", wrong)
    assert tune.walks("cpu", (1, 1, 2, 16), [16], 90, lambda run: 1.0).keys() == set(KERNELS)
    assert tune.walks("cpu", (1, 1, 2, 16), [16, 32], 90, lambda run: 1.0) == {}
