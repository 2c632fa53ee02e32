"""What runs left: `nlscale checkpoint`, `nlscale plot`; and `nlscale bench`."""

import argparse
import importlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nlscale.config.errors import UserError, require
from nlscale.config.run import replicas
from nlscale.runtime.folder import STATE, Folder
from nlscale.runtime.quiet import quiet
from nlscale.verbs.common import add, existing, foreseen, resolve

MACHINE = ("step", "data", "kernels", "checkpoint", "memory", "ladder")
LEARNING = ("hops", "beyond", "states", "forgetting", "classes", "transfer")
BENCHES = (*MACHINE, "levels", "memories", "reading", "parts", *LEARNING)


def verbs(parent: Any) -> None:
    """Adds them."""
    made = add(parent, "plot", draw, "loss, norms by level, throughput and goodput of runs, as PNG and SVG")
    made.set_defaults(recipe=None)  # it takes overrides, of the recipe that --levels draws
    made.add_argument("runs", nargs="+", metavar="RUN")
    made.add_argument("--out", help="PNG file; unset: plots/loss.png in the first run, or levels.png")
    made.add_argument(
        "--levels",
        action="store_true",
        help="of a recipe or config.yaml, then section.key=value ...: when its levels move",
    )
    group = parent.add_parser("checkpoint", help="list, verify and convert checkpoints")
    saved = group.add_subparsers(required=True, metavar="VERB")
    made = add(saved, "list", list_checkpoints, "checkpoints of a run")
    made.add_argument("run", metavar="RUN")
    made.add_argument("--json", help="also write the table to this file")
    made = add(saved, "verify", verify_checkpoints, "check every file of every checkpoint against its digest")
    made.add_argument("run", metavar="RUN")
    made = add(saved, "convert", convert, "a run's checkpoint -> one safetensors file, or such a file -> a run folder")
    made.add_argument("source", metavar="RUN|FILE")
    made.add_argument("--out", required=True, help="the file, or the run folder")
    made.add_argument("--step", type=int, help="of the checkpoint; unset: the newest")
    made.add_argument("--weights", action="store_true", help="nothing but the weights, by their own names")
    made = add(parent, "bench", bench, "tables of ratios, measured in one run")
    made.add_argument("name", choices=BENCHES)
    made.add_argument("--json", help="also write the table to this file")
    made.add_argument(
        "--profile",
        nargs="?",
        const="",
        dest="recipe",
        metavar="RECIPE",
        help="of `step`: where its time goes, instead of ratios; of a recipe, then section.key=value ...",
    )
    made.add_argument("--nproc", type=int, help="with a recipe: ranks to start here; unset: what its layout needs")
    made.add_argument("--trace", default="", help="with --profile: also write a Chrome trace of one step to this file")


def draw(options: argparse.Namespace) -> None:
    """`nlscale plot`."""
    if options.levels:
        words: list[str] = [*options.runs, *options.overrides]
        recipe, *said = sorted(words, key=lambda word: "=" in word)  # stable: the first word that is no override
        more = [each for each in said if "=" not in each]
        require(
            not more, f"plot --levels draws one recipe, {recipe}, with section.key=value ..., and not {' '.join(more)}"
        )
        run, _ = foreseen(recipe, said)
        target = Path(options.out or "levels.png")
        with drawn(target):
            print(importlib.import_module("nlscale.train.picture").picture(run, target))
        return
    require(not options.overrides, f"{' '.join(options.overrides)}: overrides are of `nlscale plot RECIPE --levels`")
    folders = [existing(run) for run in options.runs]
    target = Path(options.out) if options.out else folders[0].plot
    with drawn(target):
        print(importlib.import_module("nlscale.train.plot").plot(folders, target))


@contextmanager
def drawn(target: Path) -> Iterator[None]:
    """Draws to a file; raises UserError where it is no PNG, or cannot be written."""
    require(target.suffix == ".png", f"--out {target} must end in .png; an .svg is written beside it")
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {target}: {error.strerror}") from None


def list_checkpoints(options: argparse.Namespace) -> None:
    """`nlscale checkpoint list`."""
    folder, found, learners = existing(options.run), list[dict[str, Any]](), dict[str, Any]()
    if not folder.steps():
        print(f"{folder.path} has no checkpoint yet")
    for step in reversed(folder.steps()):  # the newest last
        path = folder.checkpoint(step)
        try:
            facts = json.loads((path / STATE).read_text())
        except (OSError, ValueError) as error:
            print(f"step {step:8d}  damaged: {STATE}: {error}; `nlscale checkpoint verify {options.run}` says all")
            continue
        learners = facts.get("learners", {})  # of the newest one, said last
        size = sum(file.stat().st_size for file in path.iterdir())
        opened = [name for name, steps in facts["windows"]["open"].items() if steps]
        found.append({"step": step, "tokens": facts["tokens"], "bytes": size, "open_windows": opened})
        print(
            f"step {step:8d}  {facts['tokens']:>14,} tokens  {size / 2**20:10.1f} MiB  "
            f"open windows: {', '.join(opened) or 'none'}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps({"checkpoints": found, "learners": learners}, indent=1) + "\n")
    for name, each in sorted(learners.items(), key=lambda item: (item[1]["unit"] == "step", pace(item[1]["period"]))):
        beat = f"every {each['period']} {each['unit']}s" if each["period"] > 1 else f"every {each['unit']}"
        beat = f"moves {beat}" if each["period"] else "never moves"
        print(f"  {name:<20s} {beat:<24s} {len(each['tensors']):6,} tensors  {each['bytes'] / 2**20:10.1f} MiB")


def pace(period: int) -> float:
    """A learner's period, to sort by; what never moves comes last."""
    return period or math.inf


def verify_checkpoints(options: argparse.Namespace) -> None:
    """`nlscale checkpoint verify`."""
    quiet()
    verify = importlib.import_module("nlscale.train.manifest").verify
    folder = existing(options.run)
    require(bool(folder.steps()), f"{folder.path} has no checkpoint")
    faults = [f"step {step}: {fault}" for step in folder.steps() for fault in verify(folder.checkpoint(step))]
    require(not faults, "\n".join(faults))
    print(f"{folder.path}: {len(folder.steps())} checkpoints, every file matches its digest")


def convert(options: argparse.Namespace) -> None:
    """`nlscale checkpoint convert`."""
    quiet()
    made = importlib.import_module("nlscale.train.convert")
    if Path(options.source).is_file():
        step = made.to_checkpoint(Path(options.source), Folder(Path(options.out)))
        print(
            f"{options.out}: checkpoint of step {step}; `nlscale train` with run.folder={options.out} goes on from there"
        )
        return
    folder = existing(options.source)
    step = folder.chosen(options.step)
    size = made.to_file(folder.checkpoint(step), Path(options.out), options.weights)
    print(f"{options.out}: step {step}, {size / 2**20:,.1f} MiB of tensors")


def profile(options: argparse.Namespace) -> int:
    """`nlscale bench step --profile [RECIPE]`."""
    own = not options.recipe and (options.nproc is not None or options.overrides)
    require(not own, "--nproc and overrides need a recipe: `nlscale bench step --profile demo`")
    require(options.nproc is None or options.nproc >= 1, f"--nproc {options.nproc} must be at least 1")
    run = resolve(options.recipe, options.overrides) if options.recipe else None
    count = (options.nproc or run.cluster.nproc or run.parallel.ranks) if run else 0
    if run:
        replicas(run, count)
    return int(importlib.import_module("nlscale.bench.profile").main(options.json, options.trace, run, count))


def bench(options: argparse.Namespace) -> int:
    """`nlscale bench`."""
    quiet()
    profiled = options.recipe is not None and options.name == "step"
    given = [options.recipe is not None, options.trace, options.nproc is not None, options.overrides]
    require(
        profiled or not any(given), "--profile, --trace, --nproc and overrides are of `nlscale bench step --profile`"
    )
    if profiled:
        return profile(options)
    return int(importlib.import_module(f"nlscale.bench.{options.name}").main(options.json))
