"""Every number of a config that makes no sense is refused before anything starts."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from nlscale.config.errors import UserError, finite
from nlscale.config.levels import Level
from nlscale.config.read import read

NONE = {"rate", "persistent", "recompute", "clip", "lr", "warmup", "workers", "shuffle_seed", "replay_batch", "beta1"}
NONE |= {"weight_decay", "kappa", "offload", "slow_weight", "momentum", "second", "slow_momentum", "slow_gain", "delta"}
NONE |= {"inner", "decay", "final", "seed", "spike", "compare", "evaluate_interval", "evaluate_rows", "keep", "beta2"}
NONE |= {"allocations", "watchdog", "lease", "gather", "gpus", "least_free", "least_write", "least_gpu_memory", "lead"}
NONE |= {"keep_every", "width", "anchor", "project", "replay"}  # may be 0
SOME = {"optim.lr", "model.width", "model.self_modifying.keep"}  # whose namesakes may


def numbers(section: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key that holds a number, its section, and how -1 is said there."""
    for part in fields(section):
        value, kind = getattr(section, part.name), str(part.type)
        if is_dataclass(value):
            yield from numbers(value, f"{name}{part.name}.")
        elif "int" in kind or "float" in kind:
            least = -1.0 if "float" in kind else -1
            yield f"{name}{part.name}", section, [least] if "list" in kind else least


def accepted(key: str, section: Any, said: Any) -> bool:
    name = key.rpartition(".")[2]
    try:
        finite(replace(section, **{name: said}))
    except UserError as refusal:
        assert name in str(refusal)
        return False
    return True


KEYS = list(numbers(read("demo")))


@pytest.mark.parametrize(("key", "section", "least"), KEYS, ids=[key for key, *_ in KEYS])
def test_a_number_that_makes_no_sense_is_refused_by_name(key: str, section: Any, least: Any) -> None:
    tried = [least, [0] if isinstance(least, list) else 0]
    tried += [float(word) for word in ("nan", "inf", "-inf")] if isinstance(least, float) else []
    found = [said for said in tried if accepted(key, section, said)]
    assert found == ([0] if key.rpartition(".")[2] in NONE and key not in SOME else [])


@pytest.mark.parametrize("key", [name for name, *_ in numbers(Level())])
def test_a_number_of_a_level_that_makes_no_sense_is_refused_by_name(key: str) -> None:
    for said in (-1, float("nan"), float("inf")):
        assert not accepted(key, Level(), said)


REFUSED = {
    "model.inner.shared=true": "model.inner.shared=True needs a level with unit: token, such as use.levels=inside",
    "model.inner.layers=2": "model.inner.layers=2 needs a level with unit: token",
    "model.mixer=delta; parallel.context=3": "cannot be split over parallel.context=3 ranks; 192 or 384 would work",
    "model.mixer=self_modifying; model.self_modifying.maker_chunk=96": (
        "model.self_modifying.maker_chunk=96 does not divide the 256 tokens of a row; 64, 128, 256 would work"
    ),
    "model.mixer=self_modifying; model.self_modifying.maker_chunk=32": (
        "model.self_modifying.chunk=64 and model.self_modifying.maker_chunk=32 do not fit; 1, 2, 4, 8, 16, 32 would work"
    ),
    "model.mixer=self_modifying; model.self_modifying.chunk=7; model.self_modifying.maker_chunk=128": (
        "model.self_modifying.chunk=7 does not divide the 256 tokens of a row; 4, 8, 16, 32, 64, 128 would work"
    ),
    "model.mixer=self_modifying; model.self_modifying.maker_chunk=128; data.sequence=250": (
        "model.self_modifying.chunk=64 and model.self_modifying.maker_chunk=128 do not divide the 250 tokens of a row; "
        "model.self_modifying.chunk=25 with model.self_modifying.maker_chunk=125 would work"
    ),
    "use.levels=inside; model.mixer=delta; model.linear.chunk=256": "a multiple of model.linear.chunk=256; 256 would",
    "use.levels=inside; model.mixer=delta; model.linear.chunk=3": "model.linear.chunk=3 does not divide the 256 tokens",
    "use.levels=inside; data.sequence=64": "is longer than a row; data.sequence=",
    "levels=[{name: all, inner: 3.0}]": "levels.all.inner=3.0 is a factor on model.inner.lr",
    "levels=[{name: all, lr: .inf}]": "levels.all.lr=inf must be a number that has an end",
    "model.vocabulary=0": "model.vocabulary=0 must be at least 1",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_does_not_fit_says_what_would_work(overrides: str) -> None:
    with pytest.raises(UserError) as refusal:
        read("demo", overrides.split("; "))
    assert REFUSED[overrides] in str(refusal.value)


def named(said: str) -> list[list[str]]:
    """What a refusal says would work, as overrides: one of several values of a setting, or several settings."""
    wrong, would = said.removesuffix(" would work").split("; ")
    if "=" in would:
        return [would.split(" with ")]
    return [[f"{wrong.split('=')[0]}={value}"] for value in would.replace(" or ", ", ").split(", ")]


@pytest.mark.parametrize("sequence", [250, 256, 97])
@pytest.mark.parametrize("makers", [None, 1, 96, 128])
@pytest.mark.parametrize("chunk", [1, 7, 24, 64])
def test_chunks_that_would_work_do(chunk: int, makers: int | None, sequence: int) -> None:
    """Whatever is named is accepted, with everything else as it was."""
    given = ["model.mixer=self_modifying", f"model.self_modifying.chunk={chunk}", f"data.sequence={sequence}"]
    given += [] if makers is None else [f"model.self_modifying.maker_chunk={makers}"]
    fits = sequence % (makers or chunk) == 0 == (makers or chunk) % chunk
    try:
        read("demo", given)
    except UserError as refusal:
        assert not fits
        for would in named(str(refusal)):
            assert read("demo", [*given, *would]).model.mixer == "self_modifying"
    else:
        assert fits


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("train.seed=2147483648", "must be below 2147483648"),
        ("optim.kappa=1e99", "must be at most 2"),
        ("model.layers=1025", "must be at most 1024"),
    ],
)
def test_numbers_that_nothing_could_work_with_are_refused(said: str, words: str) -> None:
    with pytest.raises(UserError, match=f"{said.split('=')[0]}=.* {words}"):
        read("demo", [said])
