"""Where the time goes: parts of a step, traces on demand, exposed communication; and what is said when memory runs out."""

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from nlscale.bench.profile import exposed, joined
from nlscale.cli import main
from nlscale.config.run import Run
from nlscale.runtime.clock import Clock, parted, timers
from nlscale.runtime.folder import Folder, read_lines
from nlscale.testing import ranks
from nlscale.train import loop, trace
from nlscale.train.out_of_memory import explained, ran_out, remedies, remember
from tests.corpus import small_run
from tests.records import events

SMALL = ["model.layers=2", "train.steps=8", "checkpoint.interval=8"]
LAYOUTS = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "pipeline of several chunks": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.layers=4"],
    "eager": ["optim.reduce=eager"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_step_are_the_step(layout: str, prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path, *SMALL, *LAYOUTS[layout])
    ranks(2, loop.train, run)
    lines = [line for line in read_lines(Folder(tmp_path).metrics) if "train/loss" in line]
    assert len(lines) == 8
    for line in lines:
        parts = {key: value for key, value in line.items() if key.startswith("time/")}
        whole = sum(parts.values()) + line["throughput/data_wait_seconds"]
        assert whole == pytest.approx(line["throughput/step_seconds"], rel=1e-3, abs=1e-4)
        assert min(parts.values()) >= 0 and parts["time/forward_seconds"] > 0 and parts["time/backward_seconds"] > 0
        for level in ("fast", "slow", "long"):
            assert (f"time/level/{level}/optimizer_seconds" in parts) == bool(line[f"optim/level/{level}/fired"])
    waiting = sorted(line["time/schedule_seconds"] / line["throughput/step_seconds"] for line in lines)[4]
    assert waiting > 0.15 if "pipeline" in layout else waiting < 0.1  # for the other stage
    assert lines[0]["time/gather_seconds"] == 0  # nothing has moved before the first step


def late(run: Run) -> None:
    """Trains; rank 1 comes to every step a tenth of a second late."""
    plain = loop.train_step

    def step(state: Any, *rest: Any) -> Any:
        time.sleep(0.1 * state.world.rank)
        return plain(state, *rest)

    loop.train_step = step
    loop.train(run)


def test_what_a_step_waits_for_others_is_exposed(prepared: str, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        ranks(count, late, small_run(prepared, tmp_path / str(count), *SMALL))
        lines = read_lines(Folder(tmp_path / str(count)).metrics)
        found.append(sorted(line["comm/exposed_seconds"] for line in lines if "train/loss" in line))
    assert found[0] == [0.0] * 8 and found[1][4] > 0.08


def test_a_clock_counts_what_happens_within() -> None:
    clock = Clock(torch.device("cpu"))
    timed = timers(clock, backward="backward-compute")
    with clock.span("schedule"):
        for _ in range(2):
            with clock.span("forward"):
                with clock.span("gather"):
                    time.sleep(0.01)
                time.sleep(0.02)
        timed("backward-compute", log_level=2).start()
        time.sleep(0.05)
        timed("backward-compute").stop()
        timed("forward-recv", log_level=2).start()
        time.sleep(0.03)
        timed("forward-recv").stop()
    parts = parted(clock.seconds())
    assert parts["gather"] == pytest.approx(0.02, abs=0.01)
    assert parts["forward"] == pytest.approx(0.04, abs=0.01)
    assert parts["backward"] == pytest.approx(0.05, abs=0.01)
    assert parts["schedule"] == pytest.approx(0.03, abs=0.01) and set(parts) == {
        "forward",
        "backward",
        "gather",
        "schedule",
    }
    clock.restart()
    assert clock.seconds() == {}


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CPU) -> Any:
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))


def test_communication_is_exposed_where_nothing_is_computed() -> None:
    told = [
        event("aten::mm", 0, 100), event("gloo:all_reduce", 50, 180), event("aten::add", 150, 160),
        event("Optimizer.step", 0, 500), event("gloo:all_reduce", 170, 200),
    ]  # fmt: skip
    assert exposed(told) == pytest.approx((50 + 40) / 1e6)
    kernels = [
        event("ncclDevKernel_AllReduce", 0, 40, DeviceType.CUDA), event("gemm", 30, 90, DeviceType.CUDA),
        event("aten::mm", 0, 100), event("ncclDevKernel_ReduceScatter", 80, 120, DeviceType.CUDA),
    ]  # fmt: skip
    assert exposed(kernels) == pytest.approx((30 + 30) / 1e6)
    assert joined([(5, 6), (1, 2), (2, 4)]) == [(1, 4), (5, 6)]


def traced(run: Run) -> list[tuple[bool, bool]]:
    """Trains; before step 5 somebody asks for a trace. Are gathers under way after each traced step, and at its end?"""
    plain, found, states, left = loop.train_step, [], [], []

    def step(state: Any, *rest: Any) -> Any:
        if state.step == 4 and state.world.leads:
            (Path(run.folder) / "trace").touch()
        states.append(state)
        report = plain(state, *rest)
        left.append(bool(state.optimizer.under_way))
        return report

    class Seen(trace.profile):  # type: ignore[misc]
        def __exit__(self, *error: Any) -> None:
            found.append((left[-1], bool(states[-1].optimizer.under_way)))
            super().__exit__(*error)

    loop.train_step, trace.profile = step, Seen  # type: ignore[misc]
    loop.train(run)
    return found


def test_a_trace_on_demand(prepared: str, tmp_path: Path) -> None:
    """`log.trace` is of every rank; a file in the run folder asks the first rank alone."""
    run = small_run(prepared, tmp_path, *SMALL, "log.trace=[2]")
    Folder(tmp_path).open()
    assert ranks(2, traced, run) == [[(True, False), (True, False)], [(True, False)]]
    there = sorted(path.name for path in (tmp_path / "logs" / "1").glob("trace-*"))
    assert there == [f"trace-0000000{name}.json.gz" for name in ("2-rank-00000", "2-rank-00001", "6-rank-00000")]
    assert not (tmp_path / "trace").exists()
    assert [each["step"] for each in events(run, "trace")] == [2, 6]
    with gzip.open(tmp_path / "logs" / "1" / there[0]) as file:
        names = {each.get("name") for each in json.load(file)["traceEvents"]}
    assert {"aten::mm", "gloo:all_reduce"} <= names or any("gloo" in str(name) for name in names)


def test_when_memory_runs_out_it_is_said_what_would_need_less(
    prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def step(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "train_step", step)
    small = ["model.layers=2", "model.width=32", "model.heads=4", "model.kv_heads=2", "model.hidden=64"]
    rest = [f"data.path={prepared}", "data.sequence=32", f"run.folder={tmp_path}", "train.evaluate_rows=0"]
    code = main(["train", "demo", *small, *rest, "parallel.tensor=1", "--nproc", "1", "log.wandb=disabled"])
    said = capfd.readouterr().err
    assert code == 1 and "Tried to allocate 2.00 GiB" in said
    told = "less would be needed with "
    assert "train.micro_batch=4" in said and "optim.reduce" not in said  # one rank shares with nobody
    assert told in said and "`nlscale plan` says how much" in said
    ended = [each for each in read_lines(Folder(tmp_path).events) if each["event"] == "attempt ended"]
    assert told in ended[0]["reason"]


def test_a_snapshot_of_a_gpus_memory_says_who_asked(
    prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a double of the allocator: tests/gpu has the real one."""
    kept: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **given: kept.append(given))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"there"))
    run, error = small_run(prepared, tmp_path), torch.OutOfMemoryError("no")
    remember(run.log.allocations)
    said = explained(error, run, Folder(tmp_path), 1, 2)
    assert not kept and "3.0 GiB allocated" in said and "log.allocations=100000 would add" in said
    run = small_run(prepared, tmp_path, "log.allocations=500")
    remember(run.log.allocations)
    assert [given["max_entries"] for given in kept] == [500] and "would add" not in explained(
        error, run, Folder(tmp_path), 1, 2
    )
    assert (tmp_path / "memory-rank-00001.pickle").read_bytes() == b"there"


def test_what_is_no_lack_of_memory_is_not_taken_for_one(prepared: str, tmp_path: Path) -> None:
    assert ran_out(MemoryError()) and ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not ran_out(RuntimeError("shapes do not match")) and not ran_out(ValueError("out of memory"))
    run = small_run(
        prepared, tmp_path, "model.layers=2", "parallel.pipeline=2", "optim.name=muon", "optim.reduce=eager"
    )
    found = remedies(run, 2)
    assert "train.recompute=block" in found and "parallel.tensor=2 parallel.sequence=true (on 4 ranks)" in found
    assert not any("pipeline" in each or "offload" in each or "eager" in each for each in found)  # refused, or no help
    for words in found:
        overrides = [word for word in words.split() if "=" in word]
        small_run(prepared, tmp_path, "model.layers=2", "parallel.pipeline=2", "optim.name=muon", *overrides)
