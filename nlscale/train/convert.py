"""A checkpoint as one safetensors file, and back: every tensor of it, and what a resume needs, in the file's metadata."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nlscale.config.errors import UserError, require
from nlscale.data.card import TOKENISER
from nlscale.runtime.folder import CONFIG, MANIFEST, STATE, Folder, write_durably
from nlscale.train.manifest import anew, commit, digest, verify
from nlscale.train.pieces import Pieces, load, save, stored

WEIGHTS = "weights/"
TEXTS = STATE, CONFIG, TOKENISER


def to_file(path: Path, target: Path, weights: bool = False) -> int:
    """Writes the checkpoint in `path`; gives the bytes of its tensors. All of it is held in memory.

    `weights`: the weights alone (float32), by their own names; such a file cannot become a checkpoint again. Raises
    UserError for a damaged checkpoint.
    """
    require(not target.is_dir(), f"--out {target} is a folder; a file in it would do")
    partial = target.with_name(target.name + ".partial")
    try:
        partial.touch()
    except OSError as error:
        raise UserError(f"--out {target}: {error.strerror}") from None
    faults = verify(path)
    require(not faults, f"{path} is damaged: {'; '.join(faults[:3])}")
    tensors = {
        name: torch.empty(each.shape, dtype=each.dtype)
        for name, each in stored(path).items()
        if name.startswith(WEIGHTS) or not weights
    }
    load({name: whole(tensor, False) for name, tensor in tensors.items()}, path)
    facts = {name: (path / name).read_text() for name in TEXTS if (path / name).is_file()}
    if weights:
        tensors, facts = {name.removeprefix(WEIGHTS): each for name, each in tensors.items()}, {"format": "pt"}
    save_file(tensors, partial, metadata=facts)
    partial.rename(target)
    return sum(each.nbytes for each in tensors.values())


def to_checkpoint(source: Path, folder: Folder) -> int:
    """Makes a checkpoint of the run in `folder` of a file that `to_file` wrote; gives its step. Raises UserError."""
    try:
        with safe_open(source, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{source}: {error}") from None
    require(
        STATE in facts and CONFIG in facts, f"{source} holds no whole checkpoint: weights alone cannot be gone on with"
    )
    config = OmegaConf.create(facts[CONFIG])
    taken = any(each.is_file() for each in folder.path.rglob("*"))
    require(not taken, f"--out {folder.path} holds files already; a new folder would do")
    config.run.folder = str(folder.path)
    texts = {name: facts[name] for name in TEXTS if name in facts}
    return put(tensors, texts, folder, OmegaConf.to_yaml(config))


def put(tensors: Mapping[str, Tensor], texts: Mapping[str, str], folder: Folder, config: str | None = None) -> int:
    """Commits a checkpoint of whole tensors to the run in `folder`; gives its step. `texts`: its other files by their names;
    `config`: the run's, where it has none; None: the checkpoint's.

    Raises UserError where there is one.
    """
    step = int(json.loads(texts[STATE])["step"])
    final = folder.checkpoint(step)
    require(not final.exists(), f"{final} is there already; remove it, or give another folder")
    partial = anew(final.with_name(f".{final.name}.converted.partial"))
    save({name: whole(tensor, True) for name, tensor in tensors.items()}, partial)
    for name, text in texts.items():
        write_durably(partial / name, text)
    files = {path.name: digest(path) for path in partial.iterdir()}
    write_durably(partial / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
    commit(partial, final)
    if not folder.config.exists():
        write_durably(folder.config, config or texts[CONFIG])
    return step


def whole(tensor: Tensor, owner: bool) -> Pieces:
    """A tensor as one rectangle."""
    return Pieces(tensor.shape, [((0,) * tensor.dim(), tensor)], owner)
