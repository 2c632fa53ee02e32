"""`nlscale bench step --profile`: where a training step's time goes, from the program's own clock and torch's profiler.

Real rows, the real step: of a recipe on this machine's ranks, or of four levels, on the CPU by two ranks that share nothing
but data, on a GPU by one. Exposed communication is the time in which a collective was under way and nothing was computed.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from nlscale_kernels.switch import kernels
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nlscale.bench.table import Row, beside, gpu_here, show
from nlscale.config.read import read
from nlscale.config.run import Run, replicas
from nlscale.data.card import check_data
from nlscale.data.write import Preparation, prepare
from nlscale.model.count import flops_a_token
from nlscale.parallel.apply import PRECISIONS
from nlscale.runtime.quiet import quiet
from nlscale.runtime.world import join
from nlscale.testing import ranks
from nlscale.train.loop import built, node_of
from nlscale.train.peak import peak_flops
from nlscale.train.second_order import SecondOrder
from nlscale.train.step import Report, nothing, train_step

SHAPE = ("model.width=256", "model.layers=4", "model.heads=4", "model.kv_heads=4", "model.hidden=1024")
LEVELS = (
    "levels=[{name: fast, period: 1, width: 0.25}, {name: medium, period: 4, width: 0.25}, "
    "{name: slow, period: 8, width: 0.25}, {name: long, period: 16, width: 0.25}]"
)
LONG = 256  # tokens of a row
WARM, STEPS = 3, 16  # the last level moves at the last of them
Span = tuple[float, float]


def corpus(folder: Path) -> str:
    """Rows of bytes."""
    (folder / "in").mkdir()
    text = Path(__file__).read_text()
    lines = (json.dumps({"text": text[i : i + 2000]}) + "\n" for i in range(0, len(text), 40))
    (folder / "in" / "text.jsonl").write_text("".join(lines))
    prepare(
        Preparation(
            sources=(str(folder / "in"),), out=str(folder / "out"), sequence=LONG, tokeniser="bytes", held_out=0.1
        )
    )
    return str(folder / "out")


def configure(data: str, count: int) -> Run:
    """The bench's run on `count` ranks."""
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    rows = [
        f"train.global_batch={8 * count}",
        "train.micro_batch=4",
        f"train.precision={precision}",
        "train.evaluate_rows=0",
    ]
    rest = [
        f"data.path={data}",
        f"data.sequence={LONG}",
        "model.vocabulary=384",
        "parallel.tensor=1",
        "log.wandb=disabled",
    ]
    return read("demo", [*SHAPE, *rows, *rest, f"train.steps={10 * STEPS}", LEVELS])


def steps(run: Run, trace: str) -> dict[str, float]:
    """Seconds of a step by part, the mean over STEPS; of rank 0."""
    quiet()
    with kernels(run.train.kernels):
        return measured(run, trace)


def measured(run: Run, trace: str) -> dict[str, float]:
    """The same, by the operators' chosen forms."""
    world = join(run.parallel, run.cluster, run.train.seed, node_of(run))
    replicas(run, world.size)
    cards = check_data(run.data, False)
    state, model = built(run, world, cards)
    peak, _ = peak_flops(run.log.peak_flops, PRECISIONS[run.train.precision], world.device)
    before = SecondOrder(run, model, state.optimizer).before if run.optim.second_order else nothing

    def step() -> Report:
        return train_step(state, model, cards[0].document, lambda: False, before)

    for _ in range(WARM):
        step()
    state.step = 0
    reports = [step() for _ in range(STEPS)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as seen:
        profiled = step()
        state.optimizer.arrive()  # what is under way must not end after the profiler
    if trace and world.leads:
        seen.export_chrome_trace(trace)
    whole = mean(report.seconds for report in reports)
    parts = {name: sum(report.parts.get(name, 0.0) for report in reports) / STEPS for name in named(reports)}
    parts |= {"data wait": mean(report.data_wait for report in reports)}
    parts["other"] = whole - sum(parts.values())
    tokens = mean(report.tokens for report in reports)
    work = flops_a_token(run.model, run.levels, run.data.sequence) * tokens
    share = exposed(seen.events()) / profiled.seconds
    return {"step": whole, **parts, "exposed": share * whole, "mfu": work / whole / peak, "peak": peak}


def named(reports: Iterable[Any]) -> list[str]:
    """Names of all parts, in the order of a step."""
    return list(dict.fromkeys(name for report in reports for name in report.parts))


def exposed(events: Iterable[Any]) -> float:
    """Seconds in which collectives ran and nothing was computed: kernels on a GPU, ATen operations on a CPU."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    told = [(event.name, (event.time_range.start, event.time_range.end)) for event in (on_gpu or events)]
    word = "nccl" if on_gpu else "gloo:"
    collectives = [span for name, span in told if name.startswith(word)]
    computing = [span for name, span in told if not name.startswith(word) and (on_gpu or name.startswith("aten::"))]
    both = joined([*collectives, *computing])
    return (length(both) - length(joined(computing))) / 1e6


def joined(spans: Sequence[Span]) -> list[Span]:
    """The same time as spans that do not overlap."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(spans: Sequence[Span]) -> float:
    """Of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


def main(target: str | None, trace: str = "", run: Run | None = None, count: int = 0) -> int:
    """Prints the table, of a `run` on `count` ranks here or of the bench's own; its train.steps count for nothing."""
    count = count or (1 if gpu_here() else 2)
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        run = run or configure(corpus(Path(folder)), count)
        run = replace(run, train=replace(run.train, steps=max(run.train.steps, 10 * STEPS)))
        found = ranks(count, steps, run, trace, timeout=3000)[0]
    whole, mfu, peak = found.pop("step"), found.pop("mfu"), found.pop("peak")
    table = [Row("step", whole, "s", None, None, "-", True)]
    table += [beside(name, seconds, "s", whole) for name, seconds in found.items() if name != "exposed"]
    table.append(beside("exposed communication, inside these", found["exposed"], "s", whole))
    table.append(Row("MFU: model FLOPs / seconds / peak", mfu, f"of {peak:.3g} FLOP/s", None, None, "-", True))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return show(
        f"{run.run.name}: a step of {count} rank{'s' if count > 1 else ''} on {device}, mean of {STEPS}; baseline: the step",
        table,
        target,
    )
