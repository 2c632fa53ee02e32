"""What a plan says: values for a script, and the same as a table for a person."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from math import lcm
from typing import Any

import numpy as np

from nlscale.config.devices import MEMORIES, PRODUCTS, ROOM, SCORES, STREAM, WIRE, Device
from nlscale.config.ladder import rule
from nlscale.config.run import Run
from nlscale.model.count import FLOPS, flops_a_token, parameters
from nlscale.plan.estimate import Estimate
from nlscale.plan.figures import Moves, Stage
from nlscale.plan.search import RECOMPUTE, TIES, Choice

GIB, GB = 2**30, 1e9
MANY = 2**20  # steps among which the largest is looked for
SCHEDULE = "forward, backward"
KINDS = ("weights", "windows", "masters", "moments", "states", "other")
Values = dict[str, Any]


def figures(run: Run, gpus: int, device: Device, stages: Sequence[Stage], choices: Sequence[Choice]) -> Values:
    """Everything, by name. Bytes, seconds, parameters."""
    estimate, batch = Estimate(run, gpus), run.train.global_batch * run.data.sequence
    times, busiest = estimate.times(device), max(stages, key=in_all)
    work = flops_a_token(run.model, run.levels, run.data.sequence)
    mixing = 3.0 * run.model.layers * run.model.loops * FLOPS[run.model.mixer](run.model, run.data.sequence)
    mean, peak = in_all(busiest)
    control = replace(run.model, mixer="attention")  # whose parameters decide what all recipes of a size train with
    largest, beside = max(stage.resident for stage in stages), max(stage.memory.host for stage in stages)
    return {
        "run": run.run.name,
        "gpus": gpus,
        "gpu": device.name,
        "layout": {**vars(run.parallel), "replicas": estimate.replicas, "micro_batches": estimate.micro_batches},
        "parameters": parameters(run.model, run.levels),
        "flops_a_token": {"all": work, "attention" if run.model.mixer == "attention" else "memory": mixing},
        "traffic": {"stage": busiest.index, "rows": traffic(busiest), "mean": mean, "peak": peak},
        "memory": [{**asdict(stage.memory), "activations": stage.activations, "moving": stage.moving,
                    "resident": stage.resident, "in_flight": stage.flying,
                    "twice": estimate.width * estimate.sliced(),
                    "activations_by_formula": by_policy(run, gpus, stage.index)} for stage in stages],
        "fits": largest <= ROOM * device.memory and beside <= device.host_room,
        "over": largest - ROOM * device.memory,
        "over_host": beside - device.host_room,
        "bubble": times.bubble / times.step,
        "times": asdict(times),
        "step_seconds": times.step,
        "mfu": estimate.mfu(device),
        "tokens_per_second": batch / times.step,
        "days": times.step * run.train.steps / 86400,
        "tokens": batch * run.train.steps,
        "rule": asdict(rule(sum(parameters(control, run.levels).values()), control, run.data.sequence)),
        "layouts": [{"set": each.differences(run), "resident": each.resident, "fits": each.fits(device),
                     "step_seconds": each.times.step, "mfu": each.mfu, "why": each.why()} for each in choices],
    }  # fmt: skip


def traffic(stage: Stage) -> list[Values]:
    """Rows: bytes a step that a rank sends for a level, or for its schedule, over an axis by a collective."""
    rows: list[Values] = [
        {"of": SCHEDULE, "axis": axis, "kind": kind, "mean": size, "peak": size}
        for (axis, kind), size in sorted(stage.schedule.items())
    ]
    moving = [each for each in stage.moves if not each.frozen]
    for level in dict.fromkeys(each.level for each in moving):
        own = [each for each in moving if each.level == level]
        for key in sorted({key for each in own for key in (*each.add, *each.close)}):
            mean, peak = over_steps([(each, each.add.get(key, 0.0), each.close.get(key, 0.0)) for each in own])
            rows.append({"of": level, "axis": key[0], "kind": key[1], "mean": mean, "peak": peak})
    return [row for row in rows if row["mean"] and row["axis"] != "others"]  # a few numbers for all ranks


def over_steps(sizes: Sequence[tuple[Moves, float, float]]) -> tuple[float, float]:
    """Mean and largest bytes of a step; `sizes`: what each sends at every step, and where it moves."""
    every = sum(step for _, step, _ in sizes)
    beats = [(each.period, each.phase, move) for each, _, move in sizes if move]
    sums = np.zeros(
        min(MANY, lcm(*(period for period, _, _ in beats)))
    )  # M3's slow direction makes no chain of periods
    for period, phase, move in beats:
        sums[-phase % period :: period] += move
    return every + sum(move / period for period, _, move in beats), every + float(sums.max())


def in_all(stage: Stage) -> tuple[float, float]:
    """Mean and largest bytes of a step that a rank sends."""
    moving = [each for each in stage.moves if not each.frozen]
    mean, peak = over_steps([(each, sum(each.add.values()), sum(each.close.values())) for each in moving])
    schedule = sum(row["mean"] for row in traffic(stage) if row["of"] == SCHEDULE)
    return mean + schedule, peak + schedule


def text(run: Run, plan: Values, device: Device) -> str:
    """The table."""
    parts = [
        head(run, plan),
        sizes(run, plan),
        sent(plan),
        memory(plan, device),
        speed(plan, device),
        layouts(plan, device),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def head(run: Run, plan: Values) -> list[str]:
    """What is planned."""
    layout, parallel = plan["layout"], run.parallel
    degrees = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
    degrees += f" ({parallel.virtual_pipeline} chunks a stage)" if parallel.virtual_pipeline > 1 else ""
    degrees += f" x context {parallel.context}" if parallel.context > 1 else ""
    ruled, batches = plan["rule"], layout["micro_batches"]
    return [
        f"{plan['run']} on {plan['gpus']} {plan['gpu']}",
        f"layout       {degrees} x {several(layout['replicas'], 'replica')}; {several(batches, 'micro-batch', 'es')} of "
        f"{several(run.train.micro_batch, 'row')}; recompute {run.train.recompute}",
        f"tokens       {plan['tokens'] / 1e9:,.1f}B in {run.train.steps:,} steps of {run.train.global_batch} rows "
        f"(the ladder's rule: {ruled['tokens'] / 1e9:,.1f}B, {ruled['rows']} rows, optim.lr {ruled['lr']:.1e})",
    ]


def several(count: int, what: str, more: str = "s") -> str:
    """A number of things in words."""
    return f"{count:,} {what}{more if count != 1 else ''}"


def sizes(run: Run, plan: Values) -> list[str]:
    """Parameters and operations."""
    total = sum(plan["parameters"].values())
    lines = [f"{'level':12s} {'moves':>14s} {'parameters':>12s} {'share':>6s}"]
    for level in run.levels:
        beat = "never" if level.frozen else several(level.period, level.unit)
        count = plan["parameters"][level.name]
        lines.append(f"{level.name:12s} {beat:>14s} {count / 1e6:>11.1f}M {count / total:>6.1%}")
    (mixing,) = (name for name in plan["flops_a_token"] if name != "all")
    work, own = plan["flops_a_token"]["all"], plan["flops_a_token"][mixing]
    said = "its reads and writes" if mixing == "memory" else "scores and values"
    return [*lines, f"{'all':12s} {'':14s} {total / 1e6:>11.1f}M",
            f"{work / 1e9:.3g} GFLOP a token, forward and backward; {mixing} {own / work:.1%} of it ({said})"]  # fmt: skip


def sent(plan: Values) -> list[str]:
    """Traffic."""
    found = plan["traffic"]
    lines = [f"GB that a rank of stage {found['stage']} sends a step"]
    lines.append(f"{'':20s} {'axis':12s} {'collective':14s} {'mean':>10s} {'largest':>10s}")
    for row in found["rows"]:
        sizes = f"{row['mean'] / GB:>10.3f} {row['peak'] / GB:>10.3f}"
        lines.append(f"{row['of']:20s} {row['axis']:12s} {row['kind']:14s} {sizes}")
    return [*lines, f"{'all':48s} {found['mean'] / GB:>10.3f} {found['peak'] / GB:>10.3f}"]


def by_policy(run: Run, gpus: int, rank: int) -> dict[str, float]:
    """Bytes of a stage's activations by each policy of recomputation, by formula."""
    found: dict[str, float] = {}
    for policy in RECOMPUTE:
        made = replace(run, train=replace(run.train, recompute=policy))
        found[policy] = Estimate(made, gpus).memory(rank).activations
    return found


def memory(plan: Values, device: Device) -> list[str]:
    """Memory of each stage."""
    columns = (*KINDS, "activations", "moving", "host", "resident")
    lines = [f"GiB a rank; {ROOM * device.memory / GIB:.1f} of {plan['gpu']} can be used"]
    lines.append("stage" + "".join(f"{column:>12s}" for column in columns))
    for place, stage in enumerate(plan["memory"]):
        lines.append(f"{place:5d}" + "".join(f"{stage[column] / GIB:12.2f}" for column in columns))
    first = plan["memory"][0]["activations_by_formula"]
    said = ", ".join(f"recompute={policy} {size / GIB:.2f}" for policy, size in first.items())
    lines.append("resident: what is held, and activations or what moves, whichever is more; host memory is beside it")
    if any(stage["host"] for stage in plan["memory"]):
        room = f"up to {device.host_room / GIB:.0f} of {device.beside / GIB:.0f} GiB a GPU can be used"
        lines.append(f"host memory: {room}, as a save copies as much there again")
    lines.append(f"activations of stage 0 by formula: {said}")
    if (twice := plan["memory"][0]["twice"]) >= 0.005 * GIB:
        lines.append(
            f"{twice / GIB:.2f} of its weights lie twice: where they are gathered, and in a fused product's weight"
        )
    for over, where in ((plan["over"], ""), (plan["over_host"], " in host memory")):
        if over > 0:
            lines.append(f"does not fit: {over / GIB:.1f} GiB too much{where}")
    return lines


def speed(plan: Values, device: Device) -> list[str]:
    """Time of a step and of the run."""
    step = plan["step_seconds"]
    parts = ", ".join(
        f"{name} {seconds / step:.0%}" for name, seconds in plan["times"].items() if seconds / step >= 0.005
    )
    return [
        f"step {step:.3g} s: {parts}",
        f"{plan['tokens_per_second']:,.0f} tokens/s, MFU {plan['mfu']:.1%}, {plan['days']:.1f} days",
        f"counted on: products {PRODUCTS:.0%}, attention {SCORES:.0%}, memories {MEMORIES:.0%} of {device.flops / 1e12:.0f} "
        f"TFLOP/s; {STREAM:.0%} of {device.bandwidth / 1e12:.2f} TB/s; {WIRE:.0%} of {device.link / GB:.0f} GB/s in a node "
        f"and {device.network / GB:.0f} GB/s a GPU between nodes; no overlap. Not measured on this GPU.",
    ]  # fmt: skip


def layouts(plan: Values, device: Device) -> list[str]:
    """The best layouts, with what they spend time on."""
    found = plan["layouts"]
    if not found:
        return [f"no layout: nothing divides {plan['gpus']} GPUs"]
    fitting = any(each["fits"] for each in found)
    none = f"no layout fits {plan['gpus']} {plan['gpu']}; the smallest, by formula"
    best = f"best layouts by formula; of two within {TIES:.0%} the one that cuts the model less comes first"
    lines = [best if fitting else none]
    lines.append(f"{'step s':>8s} {'MFU':>6s} {'GiB':>7s}  set; beside products")
    for each in found:
        said = " ".join(f"{key}={value}" for key, value in each["set"].items())
        values = f"{each['step_seconds']:>8.3g} {each['mfu']:>6.1%} {each['resident'] / GIB:>7.1f}"
        lines.append(f"{values}  {said or 'as it is'}; {each['why']}")
    return lines
