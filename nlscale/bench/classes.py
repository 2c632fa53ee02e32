"""Classes that come a few at a time (experiment E8 in small): what a model still tells apart after the last of them.

A class is a language: which symbols follow each symbol. The model first learns all languages as text, without names. Then
tasks come one after the other, each with rows of four classes whose last token asks for the class's name; names of earlier
tasks are not asked for any more. In the end every class is asked for: among the names of its own task, where guessing gives
one in four, and among all names, where one in sixteen. Arms are one level at several rates, continua, and the families of
continual learning.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import mean

import torch
from torch import Tensor

from nlscale.bench.drill import Rows, alone, scores, side_by_side, trained
from nlscale.bench.forgetting import FOUR, ONE, all_of, end_task, small, unanchored, walked
from nlscale.bench.table import Row, at_least, show
from nlscale.config.read import read
from nlscale.model.loss import IGNORE
from nlscale.parallel.apply import Parallelized

SYMBOLS, SUCCESSORS, TOKENS, ROWS = 32, 4, 32, 32
CLASSES, AT_ONCE = 16, 4  # classes, and those of a task
ASK, NAMES = SYMBOLS, SYMBOLS + 1  # tokens: the question, the first name
TEXT, TASK, HELD_OUT = 512, 96, 16  # steps on text, steps of a task, rows a class that are tested
RATE, SEEDS = 3e-3, (1, 2)
MODEL = small(NAMES + CLASSES, TOKENS, ROWS)
NESTED = "model.variant=nested"
REST = "[embed.weight, 'blocks.*.mix.*', 'blocks.*.continuum.norm.weight', norm.weight]"
MOVING = "{name: moving, period: 1, width: 0.25, match: [head.weight]}"
TRUNK = f"levels=[{MOVING}, {{name: trunk, period: 1, width: 0.75, match: {REST}%s}}]"
ARMS: dict[str, tuple[list[str], list[str]]] = {  # what differs while text is learnt, and while names are
    **{f"one level, rate x {f:g}": ([ONE], [ONE, f"optim.lr={f * RATE}"]) for f in (0.1, 0.3, 1.0, 2.0)},
    "four levels, independent": ([FOUR], [FOUR]),
    **{
        f"four levels, nested, rate x {f:g}": ([FOUR, NESTED], [FOUR, NESTED, f"optim.lr={f * RATE}"])
        for f in (0.3, 1.0)
    },
    "elastic weight consolidation": ([ONE], [all_of("anchor: 10.0")]),
    "orthogonal moves": ([ONE], [all_of("project: 32")]),
    "frozen trunk, a quarter moves": ([TRUNK % ""], [TRUNK % ", frozen: true"]),
    "replay, an eighth of the rows": ([ONE], [ONE]),
}
HELD = ("frozen trunk, a quarter moves", "replay, an eighth of the rows")
SWEPT = [name for name in ARMS if name.startswith("one level")]


def languages(seed: int) -> Tensor:
    """Successors of every symbol in every class (CLASSES, SYMBOLS, SUCCESSORS)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(CLASSES, SYMBOLS, SYMBOLS, generator=generator).argsort(-1)[..., :SUCCESSORS]


def text(successors: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """Symbols (N, TOKENS) of rows of the classes (N,)."""
    return walked(successors, classes, TOKENS, generator)


def as_text(symbols: Tensor) -> Rows:
    """Every symbol predicts the next one."""
    targets = torch.full_like(symbols, IGNORE)
    targets[:, :-1] = symbols[:, 1:]
    return symbols, targets


def as_question(symbols: Tensor, classes: Tensor) -> Rows:
    """The last token asks for the name, and nothing else counts."""
    tokens, targets = symbols.clone(), torch.full_like(symbols, IGNORE)
    tokens[:, -1], targets[:, -1] = ASK, NAMES + classes
    return tokens, targets


@dataclass(frozen=True)
class Told:
    """Shares of right names: in the end, among those of the class's task and among all; and of a task just learnt."""

    own: float
    all: float
    fresh: float


def told(model: Parallelized, rows: Rows) -> Told:
    """Of all classes, one after the other; `fresh` is of the classes whose names are known best."""
    names = scores(model, rows)[:, -1, NAMES:]
    classes = rows[1][:, -1] - NAMES
    task = classes // AT_ONCE
    inside = names.masked_fill(torch.arange(CLASSES) // AT_ONCE != task[:, None], -torch.inf)
    right = (names.argmax(-1) == classes).double()
    best = max(float(right[task == each].mean()) for each in task.unique())
    return Told(float((inside.argmax(-1) == classes).double().mean()), float(right.mean()), best)


def course(name: str, seed: int, steps: tuple[int, int] = (TEXT, TASK)) -> Told:
    """An arm through text and all tasks."""
    successors, generator = languages(seed), torch.Generator().manual_seed(seed)
    first, then = (read("demo", [*MODEL, f"optim.lr={RATE}", f"train.seed={seed}", *said]) for said in ARMS[name])
    every = torch.arange(CLASSES).repeat_interleave(HELD_OUT)
    tests = as_question(text(successors, every, torch.Generator().manual_seed(0)), every)
    share = ROWS // 8 if name.startswith("replay") else 0

    def drawn(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    def named(step: int) -> Rows:
        known = (step - 1) // steps[1] * AT_ONCE
        classes = drawn(known, known + AT_ONCE, ROWS - (share if known else 0))
        if known:
            classes = torch.cat([classes, drawn(0, known, share)]) if share else classes
        return as_question(text(successors, classes, generator), classes)

    with alone(first, steps[0]) as (model, optimizer):
        trained(model, optimizer, steps[0], lambda _: as_text(text(successors, drawn(0, CLASSES, ROWS), generator)))
        weights = {leaf.name: leaf.value.clone() for leaf in model.leaves}
    found: list[Told] = []
    tasks = CLASSES // AT_ONCE
    with alone(then, tasks * steps[1], weights) as (model, optimizer):
        unanchored(optimizer)

        def seen(step: int, _: float) -> None:
            if step % steps[1] == 0:
                found.append(told(model, tests))
                end_task(optimizer)

        trained(model, optimizer, tasks * steps[1], named, seen)
    return Told(found[-1].own, found[-1].all, mean(each.fresh for each in found))


def main(target: str | None) -> int:
    """Prints the table; 0 if replay and a frozen trunk keep more than one level does at any of its rates."""
    found = dict(side_by_side(course, {(name, seed): (name, seed) for name in ARMS for seed in SEEDS}))
    control = max(mean(found[name, seed].own for seed in SEEDS) for name in SWEPT)
    table = [row for name in ARMS for row in rows_for(name, [found[name, seed] for seed in SEEDS], control)]
    return show(f"{CLASSES} classes, {AT_ONCE} at a time; baseline: one level at the best of its rates", table, target)


def rows_for(name: str, told: Sequence[Told], control: float) -> list[Row]:
    """An arm's shares, means over the seeds."""
    own, among_all, fresh = (100 * mean(values) for values in zip(*map(astuple, told), strict=True))
    each = ", ".join(f"{100 * one.own:.1f}" for one in told)
    unit = f"% ({each}); {among_all:.1f} % among all names; {fresh:.1f} % when new"
    seen = Row(name, own, unit, 100 * control, own / (100 * control), "", True)
    return [at_least(name, own, unit, 100 * control, 1.0) if name in HELD else seen]
