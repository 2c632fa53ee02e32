"""`nlscale export`: a checkpoint's network as a Hugging Face folder: safetensors, its description, its tokeniser.

What a Llama computes is written as a Llama, which every program of that world reads; anything else under our own names,
with a file of code that has nlscale build it (hub/modelling.py).
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nlscale.config.errors import UserError, require
from nlscale.config.levels import learning, parameter_names
from nlscale.config.run import Run
from nlscale.data.card import TOKENISER
from nlscale.hub.described import own, speaking, words
from nlscale.hub.imported import CONFIG, INDEX, ONE
from nlscale.hub.llama import described, strange, tensors
from nlscale.hub.opened import Source, facts_of
from nlscale.model.count import sizes
from nlscale.train.convert import WEIGHTS, whole
from nlscale.train.manifest import verify
from nlscale.train.pieces import load, stored

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD = 4 * 2**30  # bytes of a file, unless one tensor has more
CODE = "modeling_nlscale.py"
BUILDS = '''"""This network is built by nlscale, which must be installed."""

from nlscale.hub.modelling import NlscaleConfig, NlscaleForCausalLM

__all__ = ["NlscaleConfig", "NlscaleForCausalLM"]
'''


@dataclass(frozen=True)
class Entry:
    """One tensor of the folder: its name there, the leaves that it is made of, and how."""

    name: str
    shape: tuple[int, ...]
    leaves: Sequence[str]
    made: Callable[[Mapping[str, Tensor]], Tensor]


def export(source: Source, out: Path, dtype: str) -> tuple[str, int]:
    """Writes the folder `out`; gives the class that reads it and the bytes of its tensors. `dtype`: of the weights there.

    Raises UserError.
    """
    require(dtype in DTYPES, f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    require(not out.exists(), f"--out {out} is there already; remove it, or give another folder")
    faults = verify(source.path)
    require(not faults, f"{source.path} is damaged: {'; '.join(faults[:3])}")
    run, tokeniser = source.run, source.tokeniser
    elements = sizes(run.model, run.levels)
    wanted = {f"{WEIGHTS}{name}": elements(name) for name in parameter_names(run.model, run.levels)}
    held = {name: prod(each.shape) for name, each in stored(source.path).items() if name.startswith(WEIGHTS)}
    require(
        wanted == held, f"{source.path} holds another network: overrides may change how a run is read, not its shape"
    )
    pace = run.model.inner.pace(facts_of(source.path)["step"], run.train.steps)
    llama = not strange(run.model) and not learns(run)
    config = described(run, tokeniser.document) if llama else own(run, tokeniser.document, pace)
    texts = {CONFIG: config | {"torch_dtype": dtype}} | words(tokeniser, run.data.sequence)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        total = write(source.path, as_llama(run) if llama else as_ours(source.path), partial, DTYPES[dtype])
        for name, facts in texts.items():
            (partial / name).write_text(json.dumps(facts, indent=2) + "\n")
        speaking(tokeniser).save(str(partial / TOKENISER))
        if not llama:
            (partial / CODE).write_text(BUILDS)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    return str(config["architectures"][0]), total


def learns(run: Run) -> bool:
    """Whether levels learn inside rows, so that weights alone do not say what the network computes."""
    return bool(learning(run.levels)) and run.model.acting.inner.lr > 0


def as_llama(run: Run) -> list[Entry]:
    """A Llama's tensors."""
    return [
        Entry(name, each.shape, [*each.leaves, *([each.gains] if each.gains else [])], each.joined)
        for name, each in tensors(run.model, run.levels).items()
    ]


def as_ours(path: Path) -> list[Entry]:
    """A checkpoint's leaves, each a tensor of its own."""
    found = {key.removeprefix(WEIGHTS): each for key, each in stored(path).items() if key.startswith(WEIGHTS)}
    return [Entry(name, each.shape, [name], itemgetter(name)) for name, each in found.items()]


def write(path: Path, entries: Sequence[Entry], out: Path, dtype: torch.dtype) -> int:
    """The tensors, a file's share in memory at a time; gives their bytes."""
    files = list(shared_out(entries, dtype.itemsize))
    many, there = len(files) > 1, stored(path)
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, share in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if many else ONE
        leaves = {
            name: torch.empty(there[f"{WEIGHTS}{name}"].shape, dtype=there[f"{WEIGHTS}{name}"].dtype)
            for entry in share
            for name in entry.leaves
        }
        load({f"{WEIGHTS}{name}": whole(leaf, False) for name, leaf in leaves.items()}, path)
        made = {entry.name: entry.made(leaves).to(dtype).contiguous() for entry in share}
        save_file(made, out / file, metadata={"format": "pt"})
        (out / file).chmod(out.stat().st_mode & 0o666)  # the library keeps a file to its user
        index["metadata"]["total_size"] += sum(each.nbytes for each in made.values())
        index["weight_map"] |= dict.fromkeys(made, file)
    if many:
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return int(index["metadata"]["total_size"])


def shared_out(entries: Sequence[Entry], itemsize: int) -> Iterator[list[Entry]]:
    """The tensors of each file, in order."""
    share, size = list[Entry](), 0
    for entry in entries:
        count = prod(entry.shape) * itemsize
        if share and size + count > SHARD:
            yield share
            share, size = [], 0
        share.append(entry)
        size += count
    yield share
