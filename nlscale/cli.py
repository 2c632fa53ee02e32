"""nlscale: the verbs. Each reads what the user said and calls one function; a user's mistake is one line, exit code 78."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

from nlscale_launch.local import gpus, start

from nlscale.config.errors import (
    FINISHED,
    SAVED_ON_SIGNAL,
    STOPPED_ON_PURPOSE,
    USER_ERROR,
    SavedOnSignal,
    StoppedOnPurpose,
    UserError,
    require,
)
from nlscale.config.nesting import learners, nesting
from nlscale.config.read import read, shipped
from nlscale.config.run import Run, replicas
from nlscale.data.card import check_data
from nlscale.model.count import parameters
from nlscale.runtime.folder import STATE, Folder, read_lines
from nlscale.runtime.quiet import quiet

CODES = {UserError: USER_ERROR, SavedOnSignal: SAVED_ON_SIGNAL, StoppedOnPurpose: STOPPED_ON_PURPOSE}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; gives the exit code."""
    parser = build_parser()
    options, overrides = parser.parse_known_args(arguments)
    unknown = [word for word in overrides if "=" not in word]
    if unknown or (overrides and not hasattr(options, "recipe")):
        parser.error(f"unknown argument {(unknown or overrides)[0]}; overrides have the form section.key=value")
    options.overrides = overrides
    try:
        return int(options.verb(options) or FINISHED)
    except tuple(CODES) as error:
        print(f"nlscale: {error}", file=sys.stderr)
        return next(code for kind, code in CODES.items() if isinstance(error, kind))


def build_parser() -> argparse.ArgumentParser:
    """Every verb and its options."""
    parser = argparse.ArgumentParser(prog="nlscale", description="Pretraining of continuum-memory Transformers.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Any, text: str, parent: Any = verbs) -> argparse.ArgumentParser:
        made = parent.add_parser(name, help=text, description=text)
        made.set_defaults(verb=function)
        return made

    def recipe(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "recipe", help=f"a path, or one of {', '.join(shipped('recipes'))}; then section.key=value ..."
        )

    made = verb("train", train, "train a run, or go on where its folder left off")
    recipe(made)
    made.add_argument("--nproc", type=int, help="ranks to start here; unset: cluster.nproc, or what the layout needs")
    made = verb("check", check, "check a recipe without torch: keys, types, ranges, layout, data")
    recipe(made)
    made.add_argument("--gpus", type=int, help="ranks that the run will have")
    data = verbs.add_parser("data", help="prepare and verify datasets").add_subparsers(required=True, metavar="VERB")
    made = verb("prepare", prepare, "documents -> tokens -> packed MDS shards", data)
    made.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="files, folders or globs of text or JSON lines; or stdlib"
    )
    made.add_argument("--out", required=True, help="folder of the dataset")
    made.add_argument("--sequence", type=int, default=2048, help="tokens a row")
    made.add_argument("--tokeniser", default="bpe:32768", help="bytes, bpe:N (trained here) or a tokenizers JSON file")
    made.add_argument("--held-out", type=float, default=0.02, help="share of the documents held out")
    made.add_argument("--field", default="text", help="field of a JSON line that holds the text")
    made.add_argument("--workers", type=int, default=0, help="processes; 0: one a core")
    made = verb("verify", verify_data, "audit every shard of a dataset", data)
    made.add_argument("folder")
    made = verb("plot", draw, "loss, norms by level and throughput of runs, as PNG and SVG")
    made.add_argument("runs", nargs="+", metavar="RUN")
    made.add_argument("--out", help="PNG file; unset: plots/loss.png in the first run")
    saved = verbs.add_parser("checkpoint", help="list, verify and convert checkpoints").add_subparsers(
        required=True, metavar="VERB"
    )
    for name, function, text in (
        ("list", list_checkpoints, "checkpoints of a run"),
        ("verify", verify_checkpoints, "check every file of every checkpoint against its digest"),
    ):
        verb(name, function, text, saved).add_argument("run", metavar="RUN")
    made = verb("convert", convert, "a run's checkpoint -> one safetensors file, or such a file -> a run folder", saved)
    made.add_argument("source", metavar="RUN|FILE")
    made.add_argument("--out", required=True, help="the file, or the run folder")
    made.add_argument("--step", type=int, help="of the checkpoint; unset: the newest")
    made.add_argument("--weights", action="store_true", help="nothing but the weights, by their own names")
    made = verb("bench", bench, "tables of ratios, measured in one run")
    made.add_argument(
        "name", choices=("step", "loader", "levels", "memories", "kernels", "parts", "states", "checkpoint")
    )
    made.add_argument("--json", help="also write the table to this file")
    return parser


def resolve(options: argparse.Namespace) -> Run:
    """The run that was asked for, its vocabulary taken from its dataset."""
    run = read(options.recipe, options.overrides)
    cards = check_data(run.data, run.train.evaluate_rows > 0)
    vocabulary = run.model.vocabulary or -(-cards[0].vocabulary // 128) * 128
    require(
        vocabulary >= cards[0].vocabulary,
        f"model.vocabulary={vocabulary} is smaller than the {cards[0].vocabulary} tokens of {run.data.sources[0].path}",
    )
    return replace(run, model=replace(run.model, vocabulary=vocabulary))


def train(options: argparse.Namespace) -> int:
    """`nlscale train`: one rank under srun or torchrun, else all ranks of this machine."""
    run = resolve(options)
    if given := os.environ.get("RANK") or os.environ.get("SLURM_PROCID"):
        if given == "0":
            Folder(Path(run.folder)).open()
        return train_rank(run, int(given))
    count = options.nproc or run.cluster.nproc or run.parallel.ranks
    replicas(run, count)
    folder = Folder(Path(run.folder))
    logs = folder.open()
    if 0 < gpus() < count:
        print(f"{count} ranks and {gpus()} GPUs here: training on the CPU", flush=True)
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ["DS_ACCELERATOR"] = "", "cpu"
    quiet()
    importlib.import_module("nlscale.train.loop")
    code = start(count, lambda rank: train_rank(run, rank), logs=str(logs), speak=True)
    if code == FINISHED:
        conclude(folder)
    return code


def train_rank(run: Run, rank: int) -> int:
    """The life of one rank, as an exit code."""
    quiet()
    loop = importlib.import_module("nlscale.train.loop")
    try:
        loop.train(run)
    except tuple(CODES) as error:
        print(f"nlscale: {error}", file=sys.stderr)
        return next(code for kind, code in CODES.items() if isinstance(error, kind))
    return FINISHED


def conclude(folder: Folder) -> None:
    """What a person wants to know at the end."""
    lines = [line for line in read_lines(folder.metrics) if "train/loss" in line]
    held_out = [line["eval/loss"] for line in read_lines(folder.metrics) if "eval/loss" in line]
    if lines:
        print(f"run folder   {folder.path}")
        print(f"first loss   {lines[0]['train/loss']:.4f}  (step {lines[0]['step']})")
        print(f"last loss    {lines[-1]['train/loss']:.4f}  (step {lines[-1]['step']})")
        if held_out:
            print(f"held-out     {held_out[-1]:.4f}")
        print(f"loss plot    {folder.plot}")


def check(options: argparse.Namespace) -> None:
    """`nlscale check`."""
    run = resolve(options)
    world = options.gpus or run.parallel.ranks
    count = replicas(run, world)
    print(f"{options.recipe}: ok")
    print(
        f"layout       tensor {run.parallel.tensor} x pipeline {run.parallel.pipeline} x {count} replicas = {world} ranks"
    )
    print(
        f"step         {run.train.global_batch} rows of {run.data.sequence} tokens, {run.train.micro_batch} a forward pass"
    )
    held = parameters(run.model, run.levels)
    total = sum(held.values())
    for place, level in enumerate(run.levels):
        beat = "frozen" if level.frozen else f"every {level.period}{' tokens' if level.unit == 'token' else ''}"
        share = f"{held[level.name] / 1e6:8.2f}M parameters ({held[level.name] / total:.0%})"
        head = "levels" if place == 0 else ""
        print(f"{head:12s} {level.name:10s} {beat:16s} {level.optimizer or run.optim.name:14s} {share}")
    order = " > ".join(", ".join(sorted(names)) for names in nesting(learners(run)))
    print(fill(order, 110, initial_indent=f"{'nesting':12s} ", subsequent_indent=" " * 13, break_on_hyphens=False))
    moved = sum(held[level.name] / level.steps for level in run.levels if not level.frozen)
    print(f"traffic      {moved / total:.3f} of what levels of period 1 would send (sum of width / period)")


def prepare(options: argparse.Namespace) -> None:
    """`nlscale data prepare`."""
    quiet()
    write = importlib.import_module("nlscale.data.write")
    plan = write.Preparation(
        sources=tuple(options.sources),
        out=options.out,
        sequence=options.sequence,
        tokeniser=options.tokeniser,
        held_out=options.held_out,
        field=options.field,
        workers=options.workers,
    )
    card = write.prepare(plan)
    print(
        f"dataset      {options.out}  ({card.tokeniser}, {card.vocabulary} tokens, fingerprint {card.fingerprint[:12]})"
    )
    for split, rows in card.rows.items():
        documents, tokens = card.documents[split], card.tokens[split]
        print(f"{split:12s} {documents:,} documents, {rows:,} rows of {card.sequence}, {tokens:,} tokens")


def verify_data(options: argparse.Namespace) -> None:
    """`nlscale data verify`."""
    quiet()
    faults = importlib.import_module("nlscale.data.verify").verify(options.folder)
    if faults:
        more = "".join(f"\n{fault}" for fault in faults[1:])
        raise UserError(f"{options.folder} is damaged: {faults[0]}{more}")
    print(f"{options.folder}: every shard matches its digest")


def existing(run: str) -> Folder:
    """The folder of a run given by path or by name."""
    for path in (Path(run), Path("runs", run)):
        if (path / "config.yaml").is_file():
            return Folder(path)
    raise UserError(f"no run '{run}': neither {run} nor runs/{run} holds a config.yaml")


def draw(options: argparse.Namespace) -> None:
    """`nlscale plot`."""
    folders = [existing(run) for run in options.runs]
    target = Path(options.out) if options.out else folders[0].plot
    print(importlib.import_module("nlscale.train.plot").plot(folders, target))


def list_checkpoints(options: argparse.Namespace) -> None:
    """`nlscale checkpoint list`."""
    folder = existing(options.run)
    for step in reversed(folder.steps()):
        path = folder.checkpoint(step)
        facts = json.loads((path / STATE).read_text())
        size = sum(file.stat().st_size for file in path.iterdir())
        open_levels = [name for name, steps in facts["windows"]["open"].items() if steps]
        print(
            f"step {step:8d}  {facts['tokens']:>14,} tokens  {size / 2**20:10.1f} MiB  "
            f"open windows: {', '.join(open_levels) or 'none'}"
        )


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
    steps = folder.steps()
    require(bool(steps), f"{folder.path} has no checkpoint")
    step = steps[0] if options.step is None else options.step
    require(step in steps, f"{folder.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    size = made.to_file(folder.checkpoint(step), Path(options.out), options.weights)
    print(f"{options.out}: step {step}, {size / 2**20:,.1f} MiB of tensors")


def bench(options: argparse.Namespace) -> int:
    """`nlscale bench`."""
    quiet()
    return int(importlib.import_module(f"nlscale.bench.{options.name}").main(options.json))


if __name__ == "__main__":
    sys.exit(main())
