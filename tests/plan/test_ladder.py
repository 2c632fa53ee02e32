"""The shipped sizes: what their recipes say follows the rule, their layouts fit, and a row found anew is the row shipped."""

import itertools
from pathlib import Path

import pytest

from nlscale.config.devices import DEVICES, ROOM
from nlscale.config.errors import UserError
from nlscale.config.ladder import rule
from nlscale.config.read import CONFIGS, load, read
from nlscale.config.run import replicas
from nlscale.model.count import parameters
from nlscale.plan.estimate import Estimate
from nlscale.plan.tables import CLASSES, COUNTS, MARGIN, SIZES, chosen
from tests.sampled import sampled

VARIANTS = ("plain", "hope-attention", "hope")
NAMED = {"m": 1e6, "b": 1e9}
TABLES = [f"{kind}-{count}" for kind, count in itertools.product(CLASSES, COUNTS)]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_what_its_name_says_and_trains_by_the_rule(size: str) -> None:
    plain = read(f"{size}-plain", ["use.layout=null"])
    count = sum(parameters(plain.model, plain.levels).values())
    assert count == pytest.approx(float(size[:-1]) * NAMED[size[-1]], rel=0.09)
    ruled = rule(count, plain.model, plain.data.sequence)
    for variant in VARIANTS:
        run = read(f"{size}-{variant}", ["use.layout=null"])
        assert (run.train.global_batch, run.train.steps, run.optim.lr) == (ruled.rows, ruled.steps, ruled.lr), variant
        own = sum(parameters(run.model, run.levels).values())
        assert own == pytest.approx(count, rel=0.08), variant
        assert [level.period for level in run.levels] == ([1] if variant == "plain" else [1, 4, 16, 64, 512])
        assert (run.model.mixer == "self_modifying") == (variant == "hope")
    path = CONFIGS / "model" / f"{size}.yaml"
    assert len(path.read_text().splitlines()) <= 7


@pytest.mark.parametrize("table", sampled(TABLES, ("h100-512", "h200-8", "h200-512")))
def test_shipped_layouts_fit(table: str) -> None:
    """Every recipe of every size in a table: the arithmetic, the memory by formula, and the rule where rows were added."""
    kind, _, gpus = table.partition("-")
    rows = load(CONFIGS / "layout" / f"{table}.yaml")
    sizes = [size for size in SIZES if size in rows]
    assert sizes == list(SIZES[: len(sizes)]) and len(sizes) >= (4 if gpus == "1" else 6)
    assert int(gpus) < 64 or sizes == list(SIZES)
    for size in sizes:
        runs = {variant: read(f"{size}-{variant}", [f"use.layout={table}"]) for variant in VARIANTS}
        plain = runs["plain"]
        count = sum(parameters(plain.model, plain.levels).values())
        ruled = rule(count, plain.model, plain.data.sequence, plain.train.global_batch)
        for variant, run in runs.items():
            assert replicas(run, int(gpus)) >= 1
            largest = Estimate(run, int(gpus)).largest
            assert largest <= MARGIN * ROOM * DEVICES[kind].memory, (size, variant, largest)
            assert (run.train.steps, run.optim.lr) == (ruled.steps, ruled.lr), (size, variant)


@pytest.mark.parametrize(("table", "size"), [("h100-1", "350m"), ("h100-8", "7b"), ("h200-64", "30b")])
def test_a_row_found_anew_is_the_row_shipped(table: str, size: str) -> None:
    kind, _, gpus = table.partition("-")
    rows = load(CONFIGS / "layout" / f"{table}.yaml")
    for name, row in chosen(size, int(gpus), DEVICES[kind]).items():
        flat = {f"{section}.{key}": str(value).lower() for section, each in row.items() for key, value in each.items()}
        shipped = {f"{section}.{key}": str(each[key]).lower() for section, each in rows[name].items() for key in each}
        assert flat == shipped, name


def test_a_size_without_a_layout_names_those_that_have_one() -> None:
    with pytest.raises(
        UserError, match=r"h100-1 has no layout for 70b, only for 125m.*70b has one in h100-64, h200-64"
    ):
        read("70b-hope", ["use.layout=h100-1"])
    with pytest.raises(UserError, match="use.layout=h300-8: choose from h100-1, "):
        read("70b-hope", ["use.layout=h300-8"])
    with pytest.raises(UserError, match="has no layout for demo"):
        read("demo", ["use.layout=h100-8"])


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    """By path; a row for a mixer comes before the size's; an override comes last."""
    table = tmp_path / "mine.yaml"
    table.write_text("125m: {train: {micro_batch: 2}}\n125m-self_modifying: {train: {micro_batch: 4}}\n")
    assert read("125m-plain", [f"use.layout={table}"]).train.micro_batch == 2
    assert read("125m-hope", [f"use.layout={table}"]).train.micro_batch == 4
    assert read("125m-hope", [f"use.layout={table}", "train.micro_batch=8"]).train.micro_batch == 8
