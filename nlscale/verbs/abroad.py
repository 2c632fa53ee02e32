"""Networks that come and go: `nlscale import`, `nlscale export`."""

import argparse
import importlib
from pathlib import Path
from typing import Any

from nlscale.runtime.quiet import quiet
from nlscale.verbs.common import add, existing

KINDS = "float32, bfloat16 or float16"


def verbs(parent: Any) -> None:
    """Adds them."""
    made = add(parent, "import", take_in, "begin a run with a network of the Llama family (Hugging Face, safetensors)")
    made.add_argument(
        "recipe",
        metavar="FOLDER",
        help="the network's; then section.key=value ..., such as run.name, data.path, use.levels",
    )
    made.add_argument("--recipe", dest="like", default="continual", help="how the run goes on (continual)")
    made = add(parent, "export", export, "a checkpoint's network as a Hugging Face folder: a Llama, where it is one")
    made.add_argument(
        "recipe", metavar="RUN", help="its name or folder; then section.key=value ..., as `generate` takes"
    )
    made.add_argument("--out", required=True, metavar="DIR", help="the folder")
    made.add_argument("--step", type=int, help="of the checkpoint; unset: the newest")
    made.add_argument("--dtype", help=f"of the weights: {KINDS}; unset: that in which the run computes")


def take_in(options: argparse.Namespace) -> None:
    """`nlscale import`."""
    quiet()
    made = importlib.import_module("nlscale.hub.imported").take_in
    run, count = made(Path(options.recipe), options.like, options.overrides)
    levels = ", ".join(f"{level.name} ({level.period} {level.unit}{'s' * (level.period > 1)})" for level in run.levels)
    print(f"run folder   {run.folder}")
    print(f"network      {count:,} parameters of {options.recipe}, as step 0; levels: {levels}")
    print(f"`nlscale train {run.folder}/config.yaml` goes on from there")


def export(options: argparse.Namespace) -> None:
    """`nlscale export`."""
    folder = existing(options.recipe)
    quiet()
    source = importlib.import_module("nlscale.hub.opened").source(folder, options.step, options.overrides)
    dtype = options.dtype or {"bf16": "bfloat16", "fp32": "float32"}[source.run.train.precision]
    kind, size = importlib.import_module("nlscale.hub.exported").export(source, Path(options.out), dtype)
    print(f"{options.out}: step {source.step} as {kind}, {size / 2**20:,.1f} MiB of {dtype}")
