"""`nlscale import`: a network of the Llama family, from its Hugging Face folder, as the checkpoint that a run begins with.

Its feed-forward units become the levels of the run, in their order, so that it computes what it did (ad-hoc level
stacking, Behrouz et al., 2025, section 7.3; spec 2.5). Files of tensors are mapped, not read: what comes from elsewhere
is written once, and nothing of it is unpickled.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nlscale.config.errors import UserError, require
from nlscale.config.nesting import registry
from nlscale.config.read import dump, read
from nlscale.config.run import Run
from nlscale.data.card import TOKENISER, Card, check_data, tokeniser_file
from nlscale.data.tokenise import make, of_bytes, of_dataset
from nlscale.hub.described import bare
from nlscale.hub.llama import SHAPE, shape_of, strange, tensors
from nlscale.optim.levels import identity
from nlscale.runtime.folder import STATE, Folder, read_json
from nlscale.runtime.log import Journal
from nlscale.train.convert import WEIGHTS, put
from nlscale.train.restore import ORIGIN
from nlscale.train.state import beginning

CONFIG, ONE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FIXED = tuple(f"model.{name}" for name in (*SHAPE.values(), "kv_heads", "tied"))  # what config.json says alone
SPARE = ("rotary_emb.inv_freq", "rotary_emb.cos_cached")  # ends of names that old folders hold beside the weights


def take_in(source: Path, recipe: str, overrides: Sequence[str]) -> tuple[Run, int]:
    """Makes the folder of a run that begins with the network in `source`; gives the run and how many parameters it has.

    Raises UserError.
    """
    run = begun(source, recipe, overrides)
    folder = Folder(Path(run.folder))
    require(not folder.config.exists(), f"{folder.path} is a run already; another run.name would work")
    cards = fitting(source, run)
    weights = dict(leaves(source, run))
    sizes = {f"{WEIGHTS}{name}": each.nbytes for name, each in weights.items()}
    facts = beginning(run, cards) | {
        "identity": identity({name: tuple(each.shape) for name, each in weights.items()}, run),
        "learners": registry(sizes, run),
        ORIGIN: str(source),
    }
    try:
        folder.checkpoint(0).parent.mkdir(parents=True, exist_ok=True)
        texts = {STATE: json.dumps(facts), folder.config.name: dump(run), **tokeniser_file(run.data.sources[0].path)}
        put({f"{WEIGHTS}{name}": each for name, each in weights.items()}, texts, folder)
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder.path}: {error.strerror}") from None
    Journal(folder, True).event("import", 0, source=str(source))
    return run, sum(each.numel() for each in weights.values())


def begun(source: Path, recipe: str, overrides: Sequence[str]) -> Run:
    """The run of a recipe whose network is that of a folder; overrides may change how it learns, not its shape."""
    require(source.is_dir(), f"{source} is no folder; that of a Hugging Face model would do")
    config = read_json(source / CONFIG)
    require(isinstance(config, dict) and bool(config), f"{source / CONFIG} is missing, or describes nothing")
    shape = shape_of(config, str(source / CONFIG))
    for said in overrides:
        key = said.removeprefix("--").split("=")[0]
        require(key not in FIXED, f"{said}: {source / CONFIG} says that it is {shape.get(key.removeprefix('model.'))}")
    run = read(recipe, [*(f"model.{key}={value}" for key, value in spelt(shape)), *overrides])
    require(not strange(run.model), f"{strange(run.model)}: a network of the Llama family computes nothing of the kind")
    return run


def spelt(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Keys and values in the form of overrides."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from spelt(value, f"{before}{key}.")
        else:
            said = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            yield f"{before}{key}", said


def fitting(source: Path, run: Run) -> list[Card]:
    """The cards of the run's datasets, which must be of the network's own tokeniser; raises UserError."""
    path, data = source / TOKENISER, run.data.sources[0].path
    require(path.is_file(), f"{path} is missing: the `tokenizers` JSON file of the network's own tokeniser")
    how = f"`nlscale data prepare SOURCE --out {data} --sequence {run.data.sequence} --tokeniser {path}`"
    require(Path(data).is_dir(), f"data.path={data}: no such folder; {how} makes it")
    cards, own, then = check_data(run.data, run.train.evaluate_rows > 0), make(str(path), ()), of_dataset(data)
    require(
        bare(own.tokenizer or of_bytes()) == bare(then.tokenizer or of_bytes()),
        f"{data} was prepared with another tokeniser than {path}, whose tokens the network knows; with another --out, "
        f"{how} would make one that fits",
    )
    require(
        own.vocabulary <= (run.model.vocabulary or 0),
        f"{path} has {own.vocabulary} tokens, and the network knows {run.model.vocabulary}",
    )
    return cards


def leaves(source: Path, run: Run) -> Iterator[tuple[str, Tensor]]:
    """Every leaf of the run's network: views of mapped files. Raises UserError for what is missing, strange or damaged."""
    wanted, files = tensors(run.model, run.levels), located(source)
    tied = {"lm_head.weight"} if run.model.tied else set()  # said again
    unknown = sorted(name for name in files.keys() - wanted.keys() - tied if not name.endswith(SPARE))
    require(not unknown, f"{source} holds {', '.join(unknown[:3])}, which a network like its {CONFIG} has not")
    missing = sorted(wanted.keys() - files.keys())
    require(not missing, f"{source} holds no {', '.join(missing[:3])}")
    for path in sorted(set(files.values())):
        try:
            with safe_open(path, "pt") as file:
                for name in (name for name in wanted if files[name] == path):
                    theirs, joined = file.get_tensor(name), wanted[name]
                    require(
                        theirs.is_floating_point() and tuple(theirs.shape) == joined.shape,
                        f"{path}: {name} is {tuple(theirs.shape)} {theirs.dtype}, and {CONFIG} wants {joined.shape} of "
                        "floating point",
                    )
                    yield from joined.cut(theirs).items()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {error}") from None
    for j in range(run.model.layers) if run.model.gains else ():
        yield f"blocks.{j}.continuum.gains", torch.ones(sum(level.width > 0 for level in run.levels))


def located(source: Path) -> dict[str, Path]:
    """The file of each tensor; raises UserError."""
    if (source / ONE).is_file():
        try:
            with safe_open(source / ONE, "pt") as file:
                return dict.fromkeys(file.keys(), source / ONE)  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source / ONE}: {error}") from None
    index = read_json(source / INDEX)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(
            f"{source} holds neither {ONE} nor {INDEX}: weights are read from safetensors alone, which name no code to run"
        )
    for name, at in found.items():
        require(
            isinstance(at, str) and Path(at).name == at, f"{source / INDEX} leads out of its folder for {name}: {at}"
        )
    return {name: source / at for name, at in found.items()}
