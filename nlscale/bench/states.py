"""State tracking: formal languages whose state must be carried exactly, on rows four times as long as any in training.

The paper's Table 5 in small: parity of random bits, (aa)* and (abab)* (Bhattamishra et al., 2020), one block of HOPE of
width 32, memories moving every token, trained on rows of at most 40 tokens, tested on tokens 41 to 160. A state that
flips needs a write that turns it round: with rates up to 2, erasing turns a key's direction round (a - e k.k = -1). What a
token's gradient adds is bounded to 0.02, so that a turn is what moves the memory most, and the main memory alone is
written: makers that are written, too, turn a little with each token, and what is then right on the trained lengths may be
lost beyond them. How often is shown by the last arms.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from nlscale.bench.drill import Rows, alone, right, side_by_side, trained
from nlscale.bench.table import Row, show
from nlscale.config.read import read
from nlscale.runtime.quiet import quiet

TRAINED, TESTED, FIRST, GROWTH, LEARNT = 40, 160, 4, 4, 0.1  # tokens; rows grow when the mean loss is below the last
WANTED = 0.999
MODEL = (
    *("use.levels=plain", "model.layers=1", "model.width=32", "model.heads=2", "model.kv_heads=2", "model.hidden=64"),
    *("model.vocabulary=4", "model.attention=causal", "model.tied=false", "model.self_modifying.chunk=1"),
    *("model.self_modifying.maker_chunk=1", "model.self_modifying.rate=2.0", "model.self_modifying.keep=0.99999"),
    *("model.self_modifying.momentum=false", "model.self_modifying.clip=0.02"),
    *("model.self_modifying.convolution=1", "model.self_modifying.written=[main]", "optim.weight_decay=0"),
    *("optim.lr=0.01", "optim.warmup=0.02", "optim.schedule=wsd", "optim.decay=0.1"),
    *("train.precision=fp32", "parallel.tensor=1", "cluster.threads=1"),
)
# Symbols are 0 and 1, answers 2 and 3.


def parity(rows: int, tokens: int, generator: torch.Generator) -> Rows:
    """Whether the random bits so far have an odd sum."""
    bits = torch.randint(0, 2, (rows, tokens), generator=generator)
    return bits, bits.cumsum(1) % 2 + 2


def pairs(rows: int, tokens: int, _: torch.Generator) -> Rows:
    """(aa)*: whether the letters so far are an odd number."""
    letters = torch.ones(rows, tokens, dtype=torch.long)
    return letters, letters.cumsum(1) % 2 + 2


def quadruples(rows: int, tokens: int, _: torch.Generator) -> Rows:
    """(abab)*: whether the word so far is in the language."""
    place = torch.arange(tokens).expand(rows, tokens)
    return (place % 2).contiguous(), (place % 4 == 3).long() + 2


LANGUAGES: dict[str, tuple[Callable[[int, int, torch.Generator], Rows], int, int]] = {  # rows and steps of training
    "parity": (parity, 32, 500),
    "(aa)*": (pairs, 8, 500),
    "(abab)*": (quadruples, 8, 500),
}
SEEDS = (1, 2, 3)


class Arm(NamedTuple):
    """One model that is trained and tested."""

    language: str
    seed: int
    other: str = ""  # what is other than above, in words and as overrides; such an arm has no target
    overrides: Sequence[str] = ()


OTHERS = (
    ("without erasing", "model.self_modifying.erase=false"),
    ("values' memory written, too", "model.self_modifying.written=[value,main]"),
    ("all five memories written", "model.self_modifying.written=[key,value,rate,keep,main]"),
)
ARMS = [
    *(Arm(language, seed) for language in LANGUAGES for seed in SEEDS),
    *(Arm("parity", seed, name, [said]) for name, said in OTHERS for seed in SEEDS),
]


class Course:
    """Rows that grow: a language on rows of up to `longest` tokens, more of them once the mean loss is low."""

    def __init__(self, language: str, seed: int) -> None:
        self.made, self.rows, _ = LANGUAGES[language]
        self.generator, self.longest, self.mean = torch.Generator().manual_seed(seed), FIRST, 1.0

    def next(self, step: int) -> Rows:
        """Rows of a step."""
        tokens = int(torch.randint(2, self.longest + 1, (), generator=self.generator))
        return self.made(self.rows, tokens, self.generator)

    def seen(self, step: int, loss: float) -> None:
        """Its loss."""
        self.mean = 0.95 * self.mean + 0.05 * loss
        if self.mean < LEARNT and self.longest < TRAINED:
            self.longest, self.mean = self.longest + GROWTH, 1.0


def learnt(language: str, seed: int, overrides: Sequence[str], steps: int | None = None) -> tuple[float, float]:
    """Share of right answers at tokens within the trained length and beyond it, after training from nothing."""
    quiet()
    made, rows, usual = LANGUAGES[language]
    count, course = steps or usual, Course(language, seed)
    sizes = [f"data.sequence={TRAINED}", f"train.micro_batch={rows}", f"train.global_batch={rows}"]
    run = read("demo-hope", [*MODEL, *sizes, f"train.seed={seed}", *overrides])
    with alone(run, count) as (model, optimizer):
        trained(model, optimizer, count, course.next, course.seen)
        found = right(model, made(256, TESTED, course.generator)).double().mean(0)
    return float(found[:TRAINED].mean()), float(found[TRAINED:].mean())


def main(target: str | None) -> int:
    """Prints the table; 0 if every language is tracked beyond the trained length, with every seed."""
    jobs = {place: (arm.language, arm.seed, arm.overrides) for place, arm in enumerate(ARMS)}
    table = [row(ARMS[place], found) for place, found in side_by_side(learnt, jobs)]
    title = f"right answers at tokens {TRAINED + 1} to {TESTED}; baseline: at tokens 1 to {TRAINED}"
    return show(title, table, target)


def row(arm: Arm, found: tuple[float, float]) -> Row:
    """An arm's answers; the rule must be right beyond what it has seen."""
    inside, beyond = found
    name = ", ".join(part for part in (arm.language, f"seed {arm.seed}", arm.other) if part)
    wanted = "" if arm.other else f">= {WANTED}"
    return Row(name, beyond, "share", inside, None, wanted, bool(arm.other) or beyond >= WANTED)
