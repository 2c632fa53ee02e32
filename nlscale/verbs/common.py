"""What verbs share: how one is added, the run that was asked for, a run that is there."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nlscale_launch.local import gpus

from nlscale.config.errors import UserError, meant, require
from nlscale.config.read import read, shipped
from nlscale.config.run import Run
from nlscale.data.card import check_data
from nlscale.runtime.folder import Folder

Verb = Callable[[argparse.Namespace], int | None]


def add(parent: Any, name: str, function: Verb, text: str) -> argparse.ArgumentParser:
    """A verb of the program, or of one of its groups."""
    made: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text)
    made.set_defaults(verb=function, parser=made)
    return made


def add_recipe(made: argparse.ArgumentParser) -> None:
    """The recipe and its overrides, as arguments of a verb."""
    made.add_argument("recipe", help=f"a path, or one of {', '.join(shipped('recipes'))}; then section.key=value ...")


def resolve(recipe: str, overrides: Sequence[str]) -> Run:
    """The run that was asked for, its vocabulary taken from its dataset."""
    run = read(recipe, overrides)
    cards = check_data(run.data, run.train.evaluate_rows > 0)
    vocabulary = run.model.vocabulary or -(-cards[0].vocabulary // 128) * 128
    require(
        vocabulary >= cards[0].vocabulary,
        f"model.vocabulary={vocabulary} is smaller than the {cards[0].vocabulary} tokens of {run.data.sources[0].path}",
    )
    return replace(run, model=replace(run.model, vocabulary=vocabulary))


def foreseen(recipe: str, overrides: Sequence[str]) -> tuple[Run, str]:
    """The run that was asked for, and what there is to say of its dataset: where `model.vocabulary` is given, it may be
    still to come.
    """
    run = read(recipe, overrides)
    missing = [source.path for source in run.data.sources if not Path(source.path).is_dir()]
    if run.model.vocabulary is None or not missing:
        return resolve(recipe, overrides), ""
    made = f"--out {missing[0]} --sequence {run.data.sequence} --tokeniser bpe:{run.model.vocabulary}"
    return run, f"{missing[0]} is not there yet; `nlscale data prepare SOURCE {made}` makes it"


def existing(run: str) -> Folder:
    """The folder of a run given by path or by name."""
    for path in (Path(run), Path("runs", run)):
        if Folder(path).config.is_file():
            return Folder(path)
    known = [path.parent.name for path in Path("runs").glob("*/config.yaml")]
    raise UserError(f"no run '{run}'{meant(run, known)}: neither {run} nor runs/{run} holds a config.yaml")


def fewer_gpus(count: int, doing: str) -> None:
    """Hides this machine's GPUs where they are fewer than `count` ranks, and says so on stderr."""
    if 0 < gpus() < count:
        print(f"{count} ranks and {gpus()} GPUs here: {doing} on the CPU", file=sys.stderr, flush=True)
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ["DS_ACCELERATOR"] = "", "cpu"


def writable(target: str | None) -> None:
    """Raises UserError where a file cannot be written, before anything takes time."""
    if target:
        there = Path(target).exists()
        try:
            Path(target).open("a").close()
            if not there:
                Path(target).unlink()
        except OSError as error:
            raise UserError(f"--json {target}: {error.strerror}") from None
