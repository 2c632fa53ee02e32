"""`nlscale check` and `nlscale plan`: what a run will need, before it takes a GPU."""

import argparse
import importlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import Any

from nlscale.config.cluster import Cluster
from nlscale.config.devices import DEVICES, ROOM, Device, device
from nlscale.config.errors import USER_ERROR, UserError, require
from nlscale.config.mixers import unattended, unblocked, unread
from nlscale.config.nesting import learners, nesting
from nlscale.config.optim import STATES
from nlscale.config.read import tables_for
from nlscale.config.run import Run, replicas
from nlscale.model.count import parameters
from nlscale.plan.estimate import Estimate
from nlscale.plan.holding import carried
from nlscale.plan.report import figures, several, text
from nlscale.plan.search import LEAST, accepted
from nlscale.runtime.quiet import quiet
from nlscale.verbs.common import add, add_recipe, foreseen
from nlscale.verbs.supplies import rows_there, too_few, unreachable

GIB, MIB = 2**30, 2**20
CHOICES = 5  # layouts that a plan shows


def verbs(parent: Any) -> None:
    """Adds them."""
    made = add(parent, "check", check, "check a recipe without torch: keys, types, ranges, layout, memory, disk, lead")
    add_recipe(made)
    made.add_argument("--gpus", type=int, help="ranks that the run will have")
    made.add_argument(
        "--gpu", default="", help=f"hold its memory against this GPU's, rather than cluster.gpu's: {', '.join(DEVICES)}"
    )
    made.add_argument("--json", help="also write what it says to this file")
    made = add(parent, "plan", plan, "what a run of any size takes, from a simulated rank of each pipeline stage")
    add_recipe(made)
    made.add_argument("--gpus", type=int, required=True, help="ranks that the run will have")
    made.add_argument("--gpu", default="", help=f"one of {', '.join(DEVICES)}; unset: cluster.gpu, or h100")
    made.add_argument("--json", help="also write everything to this file")


def check(options: argparse.Namespace) -> int:
    """`nlscale check`."""
    run, missing = foreseen(options.recipe, options.overrides)
    named = options.gpu or run.cluster.gpu
    on = device(named) if named else None
    require(options.gpus is None or options.gpus >= 1, f"--gpus {options.gpus} must be at least 1")
    world = options.gpus or run.parallel.ranks
    count = replicas_on(run, world, named, options)
    wrong = [*problems(run, world, on), *([] if missing else too_few(run, count))]
    if options.json:
        layout = {**vars(run.parallel), "replicas": count, "ranks": world, "gpu": named}
        found = {"ok": not wrong, "problems": wrong, "layout": layout, **needs(run, world)}
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{options.recipe}: {'ok' if not wrong else 'will not do'}")
    around = f" x context {run.parallel.context}" if run.parallel.context > 1 else ""
    degrees = f"tensor {run.parallel.tensor} x pipeline {run.parallel.pipeline}{around}"
    print(f"layout       {degrees} x {several(count, 'replica')} = {several(world, 'rank')}")
    print(
        f"step         {run.train.global_batch} rows of {run.data.sequence} tokens, {run.train.micro_batch} a forward pass"
    )
    show_levels(run)
    show_needs(run, world, named)
    print(f"data         {missing or rows_there(run)}")
    model, tokens = run.model, run.data.sequence
    for each in [*unread(model, tokens), *unattended(model), *unblocked(model, tokens, run.train.precision)]:
        print(fill(each, 110, initial_indent="note         ", subsequent_indent=" " * 13, break_on_hyphens=False))
    for each in wrong:
        print(fill(each, 110, initial_indent="!            ", subsequent_indent=" " * 13, break_on_hyphens=False))
    return USER_ERROR if wrong else 0


def replicas_on(run: Run, world: int, gpu: str, options: argparse.Namespace) -> int:
    """Data-parallel degree; where the world does not fit, the error also names tables that have a layout for this model."""
    try:
        return replicas(run, world)
    except UserError as error:
        used, tables = tables_for(options.recipe, options.overrides)
        some = [name for name in tables if name.startswith(gpu)] or tables
        exact = [name for name in some if name.endswith(f"-{world}")]
        if exact and used not in exact:
            raise UserError(f"{error}; use.layout={' or '.join(exact)} has a layout for it") from None
        counts = {int(name.split("-")[1]) for name in some}
        if exact or not counts:
            raise
        there = ", ".join(f"{count:,}" for count in sorted(counts))
        raise UserError(f"{error}; this model has layouts for {there} GPUs (use.layout)") from None


def show_levels(run: Run) -> None:
    """Levels, their parameters, how they nest, what they send."""
    held = parameters(run.model, run.levels)
    total = sum(held.values())
    for place, level in enumerate(run.levels):
        beat = "frozen" if level.frozen else f"every {level.period}{' tokens' if level.unit == 'token' else ''}"
        share = f"{held[level.name] / 1e6:8.2f}M parameters ({held[level.name] / total:.0%})"
        start = "levels" if place == 0 else ""
        print(f"{start:12s} {level.name:10s} {beat:16s} {level.optimizer or run.optim.name:14s} {share}")
    order = " > ".join(", ".join(sorted(names)) for names in nesting(learners(run)))
    print(fill(order, 110, initial_indent=f"{'nesting':12s} ", subsequent_indent=" " * 13, break_on_hyphens=False))
    moved = sum(held[level.name] / level.steps for level in run.levels if not level.frozen)
    print(f"traffic      {moved / total:.3f} of what levels of period 1 would send (sum of width / period)")


def needs(run: Run, world: int) -> dict[str, Any]:
    """Memory and checkpoints, by formula: bytes, seconds, parameters."""
    estimate, size = Estimate(run, world), checkpoint_bytes(run, world)
    stages = [estimate.memory(rank) for rank in range(run.parallel.pipeline)]
    most = max(stages, key=lambda stage: stage.resident)
    parts = {name: value for name, value in vars(most).items() if name != "moving" or value > most.activations}
    save = save_seconds(run, world, size)
    held = parameters(run.model, run.levels)
    return {"parameters": held, "memory": parts, "resident": most.resident, "checkpoint": size, "save_seconds": save}


def show_needs(run: Run, world: int, gpu: str) -> None:
    """The same for a person; `gpu`: what the memory is held against, nothing if empty."""
    found = needs(run, world)
    said = ", ".join(f"{name} {value / GIB:.2f}" for name, value in found["memory"].items() if value >= 0.005 * GIB)
    print(f"memory       {found['resident'] / GIB:.2f} GiB a rank at most, by formula: {said}")
    if not gpu and not run.cluster.least_gpu_memory:
        print(f"             held against no GPU's memory; --gpu {'|'.join(DEVICES)} or cluster.gpu names one")
    print(f"checkpoint   {found['checkpoint'] / GIB:.2f} GiB; a save takes about {found['save_seconds']:.0f} s")


def problems(run: Run, world: int, on: Device | None) -> Iterator[str]:
    """What will not do, and what would."""
    estimate, size = Estimate(run, world), checkpoint_bytes(run, world)
    least = run.cluster.least_gpu_memory * GIB
    room = ROOM * min([*([on.memory] if on else []), *([least] if least else [])], default=0.0)
    most = estimate.largest
    if room and most > room:
        over = f"{(most - room) / GIB:.1f} more than {room / GIB:.1f}"
        yield f"a rank needs {most / GIB:.1f} GiB, {over}; {remedy(run, world, on, room)}"
    if on and estimate.beside > on.host_room:
        yield (
            f"a rank keeps {estimate.beside / GIB:.1f} GiB in host memory (optim.offload={run.optim.offload}), and a save "
            f"copies as much again: more than the {2 * on.host_room / GIB:.0f} that {on.name} is taken to have beside it; "
            "a larger optim.offload, or more GPUs, would need less"
        )
    yield from unreachable(run)
    kept = checkpoints_kept(run)
    place = next(path for path in (Path(run.folder).absolute(), *Path(run.folder).absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "lets nobody here write" if place.is_dir() else "is no folder"
        yield f"run.folder={run.folder} cannot be made: {place} {why}; run.folder=DIR where that can be would work"
    free = shutil.disk_usage(place).free
    there = sum(path.stat().st_size for path in Path(run.folder).glob("checkpoints/step-*/*") if path.is_file())
    if kept * size > free + there:
        fits = int((free + there) // size) - 1
        only = f"checkpoint.keep={fits}{' checkpoint.keep_every=0' if run.checkpoint.keep_every else ''} would fit"
        yield (
            f"{kept} checkpoints of {size / GIB:.1f} GiB (what checkpoint.keep and keep_every leave, and the one being "
            f"written) do not fit the {(free + there) / GIB:.1f} GiB that are free in {place}; "
            f"{only if fits > 0 else 'run.folder must lie on a larger disk'}{in_total(run, world, size)}"
        )
    save = save_seconds(run, world, size)
    step = estimate.times(on).step if on else 0.0
    need = Cluster.least_lead(save, step)
    if need > run.cluster.lead:
        steps = f"two steps of {step:.1f} s" if on else "two steps, whose time --gpu would tell,"
        works = f"cluster.lead={int(need) + 1} would work" if on else f"a cluster.lead above {int(need) + 1} would work"
        yield (
            f"cluster.lead={run.cluster.lead} s is too short: two saves of {save:.0f} s (at cluster.write="
            f"{run.cluster.write:g} MiB/s a node) and {steps} take {'' if on else 'more than '}{need:.0f} s; {works}"
            + in_total(run, world, size)
        )


def in_total(run: Run, world: int, size: float) -> str:
    """What a checkpoint would take whose windows are summed over replicas first, where that is much less."""
    total = replace(run, checkpoint=replace(run.checkpoint, windows="total"))
    less = checkpoint_bytes(total, world)
    return f"; checkpoint.windows=total makes a checkpoint {less / GIB:.1f} GiB" if less < 0.7 * size else ""


def remedy(run: Run, world: int, on: Device | None, room: float) -> str:
    """The layout that fits so many GPUs, or the number of GPUs on which one does."""
    name, memory = f"GPUs with {room / ROOM / GIB:.0f} GiB", room / ROOM
    target = on if on and on.memory <= memory else replace(on or DEVICES["h100"], name=name, memory=memory)
    least = LEAST * sum(parameters(run.model, run.levels).values())
    for gpus in (world, *(world * 2**n for n in range(1, 11))):
        if least > gpus * target.memory:
            continue
        found = next(accepted(run, gpus, target, (1,)), None)  # one row a forward pass needs least
        if found and found.fits(target):
            said = " ".join(f"{key}={value}" for key, value in found.differences(run).items())
            where = [f"{gpus} GPUs"] if gpus != world else []
            return f"{' with '.join([*where, *([said] if said else [])])} would fit ({target.name})"
    return "no layout of up to 1,024 times as many GPUs fits"


def checkpoints_kept(run: Run) -> int:
    """How many there are at most, the one that is being written included."""
    settings, steps = run.checkpoint, run.train.steps
    every = -(-steps // settings.interval)
    if not settings.keep:
        return every
    lasting = steps // settings.keep_every if settings.keep_every else 0
    return min(every, settings.keep + lasting + 1)


def checkpoint_bytes(run: Run, world: int) -> float:
    """Masters, what the rules remember, what rows leave to the next ones, and open windows: one of each rank that gathers
    gradients of its own.
    """
    total, by_level = 0.0, parameters(run.model, run.levels)
    copies = replicas(run, world) * run.parallel.context
    nodes = max(1, copies // Estimate(run, world).near)
    count = {"defer": copies, "hierarchical": nodes, "eager": 1}[run.optim.reduce]
    for level in run.levels:
        held = by_level[level.name]
        total += 4 * held * (1 + len(STATES[level.optimizer or run.optim.name]))
        if level.steps > 1 and not level.frozen:
            total += 4 * held * (count if run.checkpoint.windows == "each" else 1)
    return total + sum(carried(run))


def save_seconds(run: Run, world: int, size: float) -> float:
    """Seconds of a save: every node writes its part."""
    nodes = max(1, -(-world // (run.cluster.gpus or 8)))
    return size / nodes / (run.cluster.write * MIB)


def plan(options: argparse.Namespace) -> int:
    """`nlscale plan`."""
    run, missing = foreseen(options.recipe, options.overrides)
    require(options.gpus >= 1, f"--gpus {options.gpus} must be at least 1")
    on = device(options.gpu or run.cluster.gpu or "h100")
    replicas_on(run, options.gpus, on.name, options)
    quiet()
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # of pretended groups that have no backend
    importlib.import_module("nlscale.runtime.world")  # first: megatron-core compiles nothing while it is imported there
    stages = importlib.import_module("nlscale.plan.simulate").stages(run, options.gpus, progress)
    found = figures(run, options.gpus, on, stages, list(islice(accepted(run, options.gpus, on), CHOICES)))
    found["checkpoint"] = checkpoint_bytes(run, options.gpus)
    print(text(run, found, on))
    print(f"\ncheckpoint   {found['checkpoint'] / GIB:.1f} GiB")
    if not found["fits"] and not any(each["fits"] for each in found["layouts"]):
        print(remedy(run, options.gpus, on, ROOM * on.memory))
    used = resource.getrusage(resource.RUSAGE_SELF)
    found["took"] = {"seconds": used.ru_utime + used.ru_stime, "bytes": 1024 * used.ru_maxrss}
    print(f"planned      in {found['took']['seconds']:.0f} s of a core and {found['took']['bytes'] / GIB:.1f} GiB")
    if missing:
        print(f"\n{missing}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["fits"] else USER_ERROR


def progress(rank: int, count: int) -> None:
    """Which stage is being simulated, where a person looks on."""
    if sys.stderr.isatty():
        print(
            f"\rsimulating stage {rank} of {count} ", end="" if rank + 1 < count else "\n", file=sys.stderr, flush=True
        )
