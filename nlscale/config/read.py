"""Recipe, section files and overrides -> one Run. Unknown keys and wrong types stop here, with their place."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import nlscale_configs
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nlscale.config.errors import UserError, finite, meant, require
from nlscale.config.levels import Level
from nlscale.config.model import Model
from nlscale.config.run import Run

CONFIGS = Path(nlscale_configs.__file__).parent
SECRET = re.compile(r"key|token|secret|pass|credential|auth|\$", re.IGNORECASE)  # in a name, or a name made elsewhere
LEVELS_WHOLE = "levels is a list: give it whole, levels=[{...}, {...}], or by use.levels"
NAMES, PLAIN = ("run.name", "run.folder", "data.path"), re.compile(r"(?!null$)[\w.+-]+")
SECTIONS = tuple(field.name for field in fields(Run))


def read(recipe: str, overrides: Sequence[str] = ()) -> Run:
    """The run that a recipe describes.

    A recipe is YAML: `use: {model: 125m, levels: four}` names one shipped file a section, and every other key is a
    section with what differs. `use: {layout: h100-64}` names a table of layouts, whose row for the model's size comes
    after the recipe. `overrides` are `section.key=value`, with or without leading dashes; `use.model=350m` changes a
    section's file. Raises UserError.
    """
    parts: list[DictConfig] = []
    try:
        raw = load(find(recipe))
        said = given(overrides)
        use = named(raw.pop("use", {})) | named(said.pop("use", {}))
        mixer = OmegaConf.select(OmegaConf.merge(raw, said), "model.mixer", default="attention")
        layout = laid_out(use.pop("layout", None), use.get("model") or "", mixer)
        files = [section_file(section, name) for section, name in use.items() if name is not None]
        parts = [*files, raw, layout, said]
        config = OmegaConf.merge(schema(), {"model": follows(OmegaConf.merge(*parts))}, *parts)
        check_secrets(OmegaConf.to_yaml(config))
        run = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        list_wanted = error.full_key == "levels" and "ListConfig" in str(error)
        raise UserError(LEVELS_WHOLE if list_wanted else of_level(parts) or explain(error)) from None
    except TypeError as error:  # OmegaConf's word for a mapping in the place of a list
        raise UserError(LEVELS_WHOLE if isinstance(said.get("levels"), DictConfig) else str(error)) from None
    assert isinstance(run, Run)
    finite(run)
    return run


@cache
def schema() -> DictConfig:
    """Every section with its types and defaults. Not to be written to."""
    return OmegaConf.structured(Run)  # type: ignore[no-any-return]


def follows(told: Any) -> dict[str, Any]:
    """What a model that is not told otherwise takes from the rest: the tokeniser's vocabulary, heads that are 64 wide."""
    width = OmegaConf.select(told, "model.width", default=Model.width)
    heads = max(1, width // 64) if isinstance(width, int) else Model.heads
    return {"vocabulary": OmegaConf.select(told, "data.vocabulary"), "heads": heads}


def check_secrets(config: str) -> None:
    """Raises UserError where a value of the environment that looks like a secret would come into the run's files."""
    for name in re.findall(r"oc\.env:\s*([^,}]*)", config):
        require(
            not SECRET.search(name),
            f"${{oc.env:{name}}} would be written to config.yaml and into checkpoints; the libraries that need secrets "
            "find them in the environment themselves",
        )


def given(overrides: Sequence[str]) -> DictConfig:
    """Overrides as sections; raises UserError for one that is none."""
    found = []
    for override in overrides:
        key, equals, value = override.removeprefix("--").partition("=")
        require(bool(equals), f"override '{override}' must have the form section.key=value")
        require(
            key not in SECTIONS or key == "levels",
            f"{override}: {key} is a section; use.{key}={value} names a file of it, {key}.KEY=... sets one of its values",
        )
        try:
            # In YAML off, 1e5 and 007 are no words, and nothing is null.
            word = is_word(key) if not value else key in NAMES and PLAIN.fullmatch(value) is not None
            found.append(OmegaConf.from_dotlist([f"{key}='{value}'" if word else f"{key}={value}"]))
        except YAMLError as error:
            raise UserError(f"{override}: {' '.join(str(error).split())}") from None
    return OmegaConf.merge({}, *found)  # type: ignore[return-value]


def is_word(key: str) -> bool:
    """Whether a setting is a string that has a default, as `checkpoint.upload` is."""
    try:
        return isinstance(OmegaConf.select(schema(), key), str)
    except OmegaConfBaseException:
        return False  # no such setting, which is said later


def named(use: Any) -> dict[str, str]:
    """Section -> the name of its file; raises UserError for what names none."""
    require(isinstance(use, DictConfig | dict), f"use={use}: use.SECTION=NAME names the file of a section")
    for section, name in use.items():
        require(name is None or isinstance(name, str), f"use.{section}={name}: the name of a file is a word")
    return dict(use)


def find(recipe: str) -> Path:
    """The recipe's file: a path, or the bare name of a shipped one."""
    for path in (Path(recipe), CONFIGS / "recipes" / f"{recipe}.yaml"):
        if path.is_file():
            return path
    known = shipped("recipes")
    raise UserError(f"no recipe '{recipe}'{meant(recipe, known)}: neither a file nor one of {', '.join(known)}")


def section_file(section: str, name: str) -> DictConfig:
    """What a section file says, under its section's key: a shipped one by its name, or any YAML file by its path."""
    require(section in SECTIONS, f"use.{section}: sections are {', '.join(SECTIONS)}")
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return OmegaConf.create({section: load(Path(name))})
    known = shipped(section)
    near = meant(name, known)
    require(name in known, f"use.{section}={name}{near}: choose from {', '.join(known) or 'none yet'}, or a YAML file")
    return OmegaConf.create({section: OmegaConf.load(CONFIGS / section / f"{name}.yaml")})


def laid_out(layout: str | None, model: str, mixer: str) -> DictConfig:
    """What a table of layouts says of a model, or of a model with this mixer: sections with what differs.

    Nothing where no table is named.
    """
    if layout is None:
        return OmegaConf.create({})
    sizes = shipped("model")
    require(
        not model or model in sizes or Path(model).is_file(),
        f"use.model={model}{meant(model, sizes)}: choose from {', '.join(sizes)}",
    )
    by_path = layout.endswith((".yaml", ".yml")) and Path(layout).is_file()
    require(
        by_path or layout in shipped("layout"),
        f"use.layout={layout}: choose from {', '.join(shipped('layout'))}, or a YAML file",
    )
    rows = load(Path(layout) if by_path else CONFIGS / "layout" / f"{layout}.yaml")
    if model not in rows:
        others = tables_with(model)
        raise UserError(
            f"use.layout={layout} has no layout for {model or 'a recipe that names no model file'}, only for "
            f"{', '.join(str(name) for name in rows if '-' not in str(name))}"
            + (f"; {model} has one in {', '.join(others)}" if others else "")
        )
    return OmegaConf.create(rows.get(f"{model}-{mixer}", rows[model]))


def tables_for(recipe: str, overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The table of layouts that a recipe uses, and the shipped ones that have a row for its model."""
    merged = OmegaConf.merge(load(find(recipe)), given(overrides))
    used = OmegaConf.select(merged, "use.layout", default=None)
    return used, tables_with(OmegaConf.select(merged, "use.model", default=""))


def tables_with(model: str) -> list[str]:
    """Names of the shipped tables of layouts that have a row for a model, fewest GPUs first."""
    tables = sorted(shipped("layout"), key=lambda name: int(name.rsplit("-", 1)[1]))
    return [name for name in tables if model in load(CONFIGS / "layout" / f"{name}.yaml")]


def shipped(section: str) -> list[str]:
    """Names of the files of one folder of configs."""
    return sorted(path.stem for path in (CONFIGS / section).glob("*.yaml"))


def load(path: Path) -> DictConfig:
    """A YAML mapping; raises UserError with the place of a syntax error."""
    try:
        content = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    require(isinstance(content, DictConfig), f"{path}: a recipe is a mapping of sections")
    return content  # type: ignore[return-value]


def explain(error: OmegaConfBaseException) -> str:
    """One line of a config error: the key and what was wrong with it."""
    return str(error).split("\n")[0] + (f" (at {error.full_key})" if error.full_key else "")


def of_level(parts: Sequence[DictConfig]) -> str:
    """One line of what is wrong with the first level that cannot be one; nothing where all can."""
    lists = [OmegaConf.to_container(part).get("levels") for part in parts]  # type: ignore[union-attr, call-overload]
    said = next((each for each in reversed(lists) if each is not None), None)
    for place, level in enumerate(said if isinstance(said, list) else ()):
        try:
            OmegaConf.merge(OmegaConf.structured(Level), level if isinstance(level, dict) else {})
        except OmegaConfBaseException as error:
            return f"{str(error).splitlines()[0]} (at levels.{level.get('name', place)}.{error.full_key})"
    return ""


def dump(run: Run) -> str:
    """The run as YAML that reads back as the same run."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def of_plain(told: Mapping[str, Any]) -> Run:
    """The run of nested dicts and lists, such as `plain` gives; what they leave out is as by default. Raises UserError."""
    try:
        run = OmegaConf.to_object(OmegaConf.merge(schema(), dict(told)))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    assert isinstance(run, Run)
    finite(run)
    return run


def plain(run: Run) -> dict[str, Any]:
    """The run as nested dicts and lists, for JSON and for comparison."""
    return json.loads(json.dumps(OmegaConf.to_container(OmegaConf.structured(run))))
