"""What utilisation is measured against: a given figure, the vendor's of a GPU by its driver's name, or what was measured."""

import pytest
import torch
import torch.distributed as dist

from nlscale.config.devices import DEVICES
from nlscale.runtime.world import join, leave
from nlscale.testing import ranks
from nlscale.train.peak import measured, peak_flops
from tests.tiny import tiny

NAMES = {"NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200"}


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_known_by_its_drivers_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    gpu, on = DEVICES[NAMES[name]], torch.device("cuda", 0)
    assert peak_flops(None, torch.bfloat16, on) == (8 * gpu.flops, f"vendor figure of {NAMES[name].upper()}")
    assert peak_flops(None, torch.float32, on)[0] == 8 * gpu.flops_fp32 < 8 * gpu.flops
    assert peak_flops(3e12, torch.bfloat16, on) == (24e12, "log.peak_flops")


def test_what_else_the_machine_does_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr("nlscale.train.peak.time.perf_counter", iter([0.0, 0.2, 0.25, 0.35, 0.41, 9.0]).__next__)
    assert measured(torch.float32, torch.device("cpu"), size=4) == pytest.approx(2 * 4**3 / 0.05)


def told() -> tuple[float, str]:
    run = tiny()
    world = join(run.parallel, run.cluster, 0)
    try:
        return peak_flops(None, torch.float32, world.device)
    finally:
        leave()


def test_a_cpu_is_measured_on_all_ranks_at_once() -> None:
    (one, words), other = ranks(2, told)
    assert words == "matrix products measured at start" and (one, words) == other and 1e8 < one < 1e14
