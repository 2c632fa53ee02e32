"""What a second domain takes of the first, and how soon that comes back: a stream A, B, A of two languages of bigrams.

Both languages have the same symbols and other successors, so that the weights that say what follows a symbol must change or
hold both; which language a row is in, its first tokens tell. Arms are one level at several rates, one level that moves
seldom (accumulation), continua of four levels, and the families of continual learning. Arms learn B at different speeds, so
the loss on A is compared where the loss on B is the same, between two looks in proportion: what the slowest arm ends with.
As in experiment E1 of the continual-learning protocol, the single level's rate is swept: a lower rate forgets less, too.

A reset brings forgotten things back where the fast level had not yet handed them on: all but a quarter of the feed-forward
units moves every step, that quarter every 64, and at the first boundary after A has ended the former begins anew from its
slow copy, which has followed it half of the way (of a squared loss 1 - 1/4 would come back; row 20). What is then known of
both languages lies between what was and what is, where no path from A to B leads: it is held against one level, at each
of its rates, where that knows as much of B.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from nlscale.bench.drill import Rows, alone, apart, side_by_side, trained
from nlscale.bench.table import Row, show
from nlscale.config.read import read
from nlscale.optim.build import Optimizer
from nlscale.optim.tasks import IMPORTANCE, held
from nlscale.parallel.apply import Parallelized
from nlscale.runtime.quiet import quiet

SYMBOLS, SUCCESSORS, TOKENS, ROWS, HELD_OUT = 64, 4, 64, 32, 128
FIRST, SECOND, AGAIN, EVERY = 384, 384, 128, 4  # steps of A, of B, of A once more at most; steps between looks
NEAR = 0.05  # A is learnt again when its loss is so near to what it was
RATE = 3e-3


def small(vocabulary: int, tokens: int, rows: int) -> list[str]:
    """Two blocks of width 64 that learn at an even rate."""
    shape = "layers=2", "width=64", "heads=4", "kv_heads=4", "hidden=256", "tied=false", "attention=causal"
    even = "warmup=0.02", "schedule=wsd", "decay=0.001", "weight_decay=0"
    return [
        *(f"model.{each}" for each in (*shape, f"vocabulary={vocabulary}")),
        *(f"optim.{each}" for each in even),
        *("train.precision=fp32", f"train.micro_batch={rows}", f"train.global_batch={rows}"),
        *(f"data.sequence={tokens}", "parallel.tensor=1", "cluster.threads=1"),
    ]


MODEL = small(SYMBOLS, TOKENS, ROWS)
ONE, FOUR = "use.levels=plain", "use.levels=four"
PARTED = "levels=[{name: fast, period: 1, width: 0.75}, {name: slow, period: %d, width: 0.25}]"
BACK, LEAST = 64, 0.5  # steps of B until the reset, and the share of A that is to come back


def all_of(what: str) -> str:
    """One level with a switch of continual learning."""
    return f"levels=[{{name: all, {what}}}]"


ARMS = {
    **{f"one level, rate x {factor:g}": [ONE, f"optim.lr={factor * RATE}"] for factor in (0.3, 1.0, 2.0, 4.0)},
    "one level that moves every 16 steps": [all_of("period: 16"), f"optim.lr={3 * RATE}"],
    "four levels, independent": [FOUR, f"optim.lr={RATE}"],
    "four levels, sequential": [FOUR, "model.variant=sequential", f"optim.lr={RATE}"],
    "four levels, nested": [FOUR, "model.variant=nested", f"optim.lr={RATE}"],
    "two levels, nested": [PARTED % BACK, "model.variant=nested", f"optim.lr={RATE}"],
    "elastic weight consolidation": [all_of("anchor: 10.0"), f"optim.lr={RATE}"],
    "orthogonal moves": [all_of("project: 16"), f"optim.lr={RATE}"],
    "replay, an eighth of the rows": [ONE, f"optim.lr={RATE}"],
}
SWEPT = [name for name in ARMS if name.startswith("one level, rate")]
SEEDS = (1, 2, 3, 4)
RESETS = (*SEEDS, 5, 6, 7, 8)  # seeds of the reset


def language(seed: int) -> Tensor:
    """Successors of every symbol (SYMBOLS, SUCCESSORS), all equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(SYMBOLS, SYMBOLS, generator=generator).argsort(1)[:, :SUCCESSORS]


def walked(successors: Tensor, which: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Symbols (N, tokens) of rows of the languages `which` (N,), whose successors are (languages, symbols, choices)."""
    _, symbols, choices = successors.shape
    found = [torch.randint(0, symbols, which.shape, generator=generator)]
    for _ in range(tokens - 1):
        choice = torch.randint(0, choices, which.shape, generator=generator)
        found.append(successors[which, found[-1], choice])
    return torch.stack(found, 1)


def rows_of(successors: Tensor, count: int, generator: torch.Generator) -> Rows:
    """Tokens and the tokens after them (count, TOKENS)."""
    whole = walked(successors[None], torch.zeros(count, dtype=torch.long), TOKENS + 1, generator)
    return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()


def languages(seed: int) -> tuple[tuple[Tensor, Tensor], list[Rows]]:
    """A and B, and rows of both to test on."""
    both = language(2 * seed), language(2 * seed + 1)
    return both, [rows_of(each, HELD_OUT, torch.Generator().manual_seed(0)) for each in both]


@dataclass(frozen=True)
class Course:
    """Held-out losses (nats a token) on both languages, when B begins and at every look since; steps to learn A again."""

    looks: list[tuple[float, float]]  # on B, on A
    again: int

    @property
    def learnt(self) -> float:
        """Loss on A after A."""
        return self.looks[0][1]

    def at(self, level: float) -> float:
        """Loss on A where that on B first comes down to `level`: between two looks, in proportion."""
        for (above, old), (below, new) in pairwise(self.looks):
            if below <= level:
                return old if above <= level else new + (old - new) * (level - below) / (above - below)
        return self.looks[-1][1]


@torch.no_grad()
def loss(model: Parallelized, rows: Rows) -> float:
    """Nats a token."""
    tokens, targets = rows
    return float(model.chunks[0](tokens, targets, torch.zeros_like(tokens, dtype=torch.bool))) / targets.numel()


def end_task(optimizer: Optimizer) -> None:
    """What anchors and projections keep, they keep of A; before a task has ended an anchor does not pull."""
    optimizer.tasks.end([group.level.name for group in optimizer.tasks.groups])


def unanchored(optimizer: Optimizer) -> None:
    """While no task has ended, nothing pulls to where the run began."""
    for mover in optimizer.tasks.movers.values():
        for rule, _ in held(mover):
            if IMPORTANCE in rule.state:
                rule.state[IMPORTANCE].zero_()


def course(name: str, seed: int, steps: tuple[int, int, int] = (FIRST, SECOND, AGAIN)) -> Course:
    """An arm through the stream."""
    quiet()
    run, generator = read("demo", [*MODEL, f"train.seed={seed}", *ARMS[name]]), torch.Generator().manual_seed(seed)
    (a, b), tests = languages(seed)
    first, second, _ = steps
    looks: list[tuple[float, float]] = []
    back: list[tuple[float, float]] = []
    share = ROWS // 8 if name.startswith("replay") else 0

    def made(step: int) -> Rows:
        if first < step <= first + second:
            pieces = rows_of(b, ROWS - share, generator), rows_of(a, share, generator)
            return torch.cat([pieces[0][0], pieces[1][0]]), torch.cat([pieces[0][1], pieces[1][1]])
        return rows_of(a, ROWS, generator)

    with alone(run, sum(steps)) as (model, optimizer):
        unanchored(optimizer)

        def seen(step: int, _: float) -> None:
            if step == first:
                end_task(optimizer)
            if step == first or step % EVERY == 0 and step > first:
                on_a, on_b = (loss(model, rows) for rows in tests)
                (looks if step <= first + second else back).append((on_b, on_a))

        trained(model, optimizer, sum(steps), made, seen)
    soon = next((place for place, (_, on_a) in enumerate(back, 1) if on_a <= looks[0][1] + NEAR), len(back) + 1)
    return Course(looks, EVERY * soon)


@dataclass(frozen=True)
class Reset:
    """Losses on A when it is learnt, and just before and after the first reset since B began; then on B."""

    learnt: float
    before: float
    after: float
    second: float

    @property
    def share(self) -> float:
        """Of what was forgotten, how much the reset brings back."""
        return (self.before - self.after) / (self.before - self.learnt)


def recovered(seed: int, steps: tuple[int, int] = (FIRST, BACK)) -> Reset:
    """Two nested levels through A and B up to the reset."""
    quiet()
    first, period = steps
    said = [PARTED % period, "model.variant=nested", f"optim.lr={RATE}", f"train.seed={seed}"]
    run, generator = read("demo", [*MODEL, *said]), torch.Generator().manual_seed(seed)
    ((a, b), tests), seen = languages(seed), dict[int, tuple[float, float]]()
    with alone(run, first + period) as (model, optimizer):

        def look(step: int, _: float) -> None:
            if step in (first, first + period - 1, first + period):
                seen[step] = loss(model, tests[0]), loss(model, tests[1])

        trained(model, optimizer, first + period, lambda s: rows_of(a if s <= first else b, ROWS, generator), look)
    (learnt, _), (before, _), (after, second) = seen.values()
    return Reset(learnt, before, after, second)


def main(target: str | None) -> int:
    """Prints the table; 0 if a reset of the nested continuum brings back what it should, and leaves more of A than one level
    keeps at any of its rates.
    """
    jobs: dict[tuple[str, int], tuple[Any, ...]] = {(name, seed): (name, seed) for name in ARMS for seed in SEEDS}
    for seed in set(RESETS).difference(SEEDS):
        jobs |= {(name, seed): (name, seed, (FIRST, BACK, 0)) for name in SWEPT}
    found = dict(side_by_side(course, jobs))
    levels = {seed: max(min(second for second, _ in found[name, seed].looks) for name in ARMS) for seed in SEEDS}
    control = min(([found[name, seed].at(levels[seed]) for seed in SEEDS] for name in SWEPT), key=mean)
    table = [row for name in ARMS for row in rows_for(name, [found[name, s] for s in SEEDS], levels.values(), control)]
    resets = dict(side_by_side(recovered, {seed: (seed,) for seed in RESETS}))
    table += reset_rows(list(resets.values()), [[found[name, seed] for seed in resets] for name in SWEPT])
    said = ", ".join(f"{level:.3f}" for level in levels.values())
    return show(f"loss on A where the loss on B is {said}; baseline: one level at the best of its rates", table, target)


def rows_for(name: str, courses: Sequence[Course], levels: Iterable[float], control: Sequence[float]) -> list[Row]:
    """An arm's loss on A at the matched loss on B, and how soon A is learnt again: means over the seeds.

    `control`: losses of the single level at the best of its rates, by seed.
    """
    values = [each.at(level) for each, level in zip(courses, levels, strict=True)]
    more, error = apart(values, control)
    unit = f"nats ({more:+.2f}, standard error {error:.2f}); {mean(each.learnt for each in courses):.3f} after A"
    again = mean(each.again for each in courses)
    return [
        Row(name, mean(values), unit, mean(control), mean(values) / mean(control), "", True),
        Row(f"{name}: A again", again, "steps", None, None, "", True),
    ]


def reset_rows(found: Sequence[Reset], single: Sequence[Sequence[Course]]) -> list[Row]:
    """What a reset brings back, and what is then known of A beside one level that knows as much of B: means over the seeds.

    `single`: by rate, the single level's courses, a seed each. The reset is held to leave more of A than the best rate by
    two standard errors of the difference.
    """
    name = f"two levels, nested, at the reset after {BACK} steps of B"
    each = ", ".join(f"{one.share:.3f}" for one in found)
    share, after = mean(one.share for one in found), [one.after for one in found]
    control = min(([c.at(one.second) for c, one in zip(row, found, strict=True)] for row in single), key=mean)
    more, error = apart(after, control)
    unit = f"nats ({more:+.2f}, standard error {error:.2f}); {mean(one.second for one in found):.3f} on B"
    better = more + 2 * error < 0
    return [
        Row(f"{name}: of A, what comes back ({each})", share, "share", None, None, f">= {LEAST}", share >= LEAST),
        Row(name, mean(after), unit, mean(control), mean(after) / mean(control), "< 1x by 2 errors", better),
    ]
