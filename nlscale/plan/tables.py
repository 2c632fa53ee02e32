"""The shipped tables of layouts (configs/layout): `python -m nlscale.plan.tables` writes them anew, in some minutes.

For each GPU, number of GPUs and size: the fastest layout by formula (plan/search.py) that fits, once for attention and once
for self-modifying Titans. The batch is the ladder's rule's, unless more rows let the GPUs work much better: then the fewest
rows with which they reach ENOUGH of the best use, with steps and rate by the same rule, alike for all recipes of a size. A
layout must fit MARGIN of what a plan counts on, since the formula is not the simulation.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from nlscale.config.devices import DEVICES, Device
from nlscale.config.errors import UserError
from nlscale.config.ladder import rule
from nlscale.config.read import CONFIGS, read
from nlscale.config.run import Run
from nlscale.model.count import parameters
from nlscale.plan.search import LEAST, Choice, accepted, assessed

SIZES = ("125m", "350m", "760m", "1.3b", "2.7b", "7b", "13b", "30b", "70b")
COUNTS = (1, 8, 64, 512, 1024)
CLASSES = ("h100", "h200")
ENOUGH = 0.7
MARGIN = 0.9
DOUBLINGS = 7
TRIED = 40  # layouts, until one fits the control, too
BETTER = 0.03


def plain(size: str) -> Run:
    """A size's control, whose parameters decide what all of its recipes train with."""
    return read(f"{size}-plain", ["use.layout=null"])


def batches(size: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(rows, what differs from the recipe), the rule's own first."""
    run = plain(size)
    count = sum(parameters(run.model, run.levels).values())
    own = rule(count, run.model, run.data.sequence).rows
    yield own, {}
    for rows in (own * 2**n for n in range(1, DOUBLINGS + 1)):
        ruled = rule(count, run.model, run.data.sequence, rows)
        yield rows, {"train": {"global_batch": rows, "steps": ruled.steps}, "optim": {"lr": ruled.lr}}


def chosen(size: str, gpus: int, on: Device) -> dict[str, dict[str, Any]]:
    """Rows of a table: size, and size-mixer where that differs; none where nothing fits."""
    found: list[tuple[dict[str, Any], Choice, Choice]] = []
    run, tight = plain(size), replace(on, memory=MARGIN * on.memory, beside=MARGIN * on.beside)
    if LEAST * sum(parameters(run.model, run.levels).values()) > gpus * tight.memory:
        return {}
    for rows, differs in batches(size):
        pair = [fastest(f"{size}-{variant}", rows, gpus, tight) for variant in ("hope-attention", "hope")]
        if pair[0] and pair[1]:
            found.append((differs, pair[0], pair[1]))
            if len(found) > 1 and found[-1][1].mfu < (1 + BETTER) * found[-2][1].mfu:
                break  # more rows no longer help
    if not found:
        return {}
    most = max(attention.mfu for _, attention, _ in found)
    differs, attention, memory = next(each for each in found if each[1].mfu >= ENOUGH * most)
    table = {size: sections(attention, differs)}
    other = sections(memory, differs)
    return table if other == table[size] else table | {f"{size}-self_modifying": other}


def fastest(recipe: str, rows: int, gpus: int, on: Device) -> Choice | None:
    """The best layout of a recipe with so many rows a step; None where none fits."""
    run = read(recipe, ["use.layout=null"])
    try:
        choices = islice(accepted(replace(run, train=replace(run.train, global_batch=rows)), gpus, on), TRIED)
    except UserError:
        return None
    return next((each for each in choices if each.fits(on) and control_fits(recipe, each, on)), None)


def control_fits(recipe: str, choice: Choice, on: Device) -> bool:
    """Whether a layout of HOPE-Attention is one of the control, too, which keeps all of its state on the host or none."""
    if not recipe.endswith("hope-attention"):
        return True
    run, made = choice.run, plain(recipe.removesuffix("-hope-attention"))
    optim = replace(made.optim, reduce=run.optim.reduce, offload=1 if run.optim.offload == 1 else 0)
    made = replace(made, parallel=run.parallel, train=run.train, optim=optim)
    found = assessed(made, choice.gpus, on)
    return found is not None and found.fits(on)


def sections(choice: Choice, differs: dict[str, Any]) -> dict[str, Any]:
    """What a row says, by section."""
    found: dict[str, Any] = {section: dict(values) for section, values in differs.items()}
    for key, value in choice.differences().items():
        section, name = key.split(".")
        found.setdefault(section, {})[name] = value
    return found


def written(table: dict[str, dict[str, Any]]) -> str:
    """A table as YAML, a row a line."""

    def mapping(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {mapping(each)}" for key, each in value.items()) + "}"
        return f"{value:.1e}" if isinstance(value, float) else str(value)

    return "".join(f"{name}: {mapping(row)}\n" for name, row in table.items())


def main(names: Sequence[str]) -> None:
    """Writes the tables named, such as h100-64; all where none is."""
    for name in names or [f"{kind}-{gpus}" for kind in CLASSES for gpus in COUNTS]:
        kind, _, gpus = name.partition("-")
        table: dict[str, dict[str, Any]] = {}
        for size in SIZES:
            table |= chosen(size, int(gpus), DEVICES[kind])
        head = f"# Layouts for {gpus} {kind}, by `python -m nlscale.plan.tables`; sizes that are missing do not fit.\n"
        (CONFIGS / "layout" / f"{name}.yaml").write_text(head + written(table))
        print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
