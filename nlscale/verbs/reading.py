"""What trained runs say and are worth: `nlscale generate`, `nlscale eval`."""

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlscale_launch.local import start

from nlscale.config.errors import CODES, FINISHED, ORDERLY, UserError, code_of, require
from nlscale.runtime.quiet import quiet
from nlscale.verbs.common import add, existing, fewer_gpus


def verbs(parent: Any) -> None:
    """Adds them."""
    made = add(parent, "generate", generate, "go on with a text, with the memories of everything read so far")
    made.add_argument(
        "recipe", metavar="RUN", help="its name or folder; then section.key=value ..., which change how it is read"
    )
    made.add_argument("--prompt", default="", help="the text to go on with; unset: a document begins")
    made.add_argument("--prompt-file", metavar="FILE", help="a file that holds it; -: standard input")
    made.add_argument("--tokens", type=int, default=200, help="to make at most (200); it ends where the document does")
    made.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    made.add_argument("--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0: from all")
    made.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest that hold this probability; 1: all"
    )
    made.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    made.add_argument("--step", type=int, help="of the checkpoint; unset: the newest")
    made = add(
        parent, "eval", evaluate, "held-out loss of a checkpoint, by the place in the row; longer rows; memory tasks"
    )
    made.add_argument("recipe", metavar="RUN", help="its name or folder; then section.key=value ..., such as data.path")
    made.add_argument("--rows", type=int, help="so many held-out rows; unset: train.evaluate_rows, or 64")
    made.add_argument("--longer", type=int, default=1, metavar="K", help="rows of K times training's tokens (1)")
    made.add_argument("--tasks", default="", help="names with commas between, or all: recall, needle, shift, ...")
    made.add_argument("--step", type=int, help="of the checkpoint; unset: the newest")
    made.add_argument("--json", help="also write it to this file")


def generate(options: argparse.Namespace) -> int:
    """`nlscale generate`."""
    folder, text = existing(options.recipe), prompt(options)
    quiet()
    sampling = importlib.import_module("nlscale.hub.sampling").Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    source = importlib.import_module("nlscale.hub.opened").source(folder, options.step, options.overrides)
    made = importlib.import_module("nlscale.hub.generate").generate
    return together(source.run.parallel.ranks, lambda: made(source, text, options.tokens, sampling))


def evaluate(options: argparse.Namespace) -> int:
    """`nlscale eval`."""
    folder = existing(options.recipe)
    quiet()
    room = importlib.import_module("nlscale.hub.evaluate")
    source = importlib.import_module("nlscale.hub.opened").source(folder, options.step, options.overrides)
    rows = (source.run.train.evaluate_rows or 64) if options.rows is None else options.rows
    names = list(dict.fromkeys(name for name in options.tasks.split(",") if name))
    asked = room.Evaluation(rows=rows, longer=options.longer, tasks=list(room.TASKS) if "all" in names else names)
    return together(source.run.parallel.ranks, lambda: room.evaluate(source, asked, options.json))


def prompt(options: argparse.Namespace) -> str:
    """The text to go on with."""
    require(not (options.prompt and options.prompt_file), "--prompt and --prompt-file: give one of them")
    said = "--prompt" if options.prompt_file is None else f"--prompt-file {options.prompt_file}"
    try:
        if options.prompt_file is None:
            text = str(options.prompt)
        else:
            text = sys.stdin.read() if options.prompt_file == "-" else Path(options.prompt_file).read_text()
        text.encode()  # what is no UTF-8 comes as characters that cannot be written
    except (OSError, UnicodeError) as error:
        raise UserError(f"{said}: {getattr(error, 'strerror', None) or error}") from None
    return text


def together(count: int, work: Callable[[], None]) -> int:
    """Runs `work` in this process, or on so many ranks of this machine, of which the first has the terminal."""
    fewer_gpus(count, "reading")
    if count == 1:  # whatever rank a job has given this process: it reads alone
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        work()
        return FINISHED

    def rank(number: int) -> int:
        try:
            work()
        except tuple(CODES) as error:
            if number == 0:
                print(f"nlscale: {error}", file=sys.stderr)
            return code_of(error)
        return FINISHED

    logs = tempfile.mkdtemp(prefix="nlscale-")
    code = start(count, rank, logs=logs, speak=True)
    if code in ORDERLY:  # else they say why
        shutil.rmtree(logs)
    return code
