"""`nlscale eval`: what a checkpoint's network loses on held-out rows, by the place in the row, and what its memory can do.

Rows may be longer than those of training: the corpus goes on where a row ends, so rows that follow one another are joined.

B rows, T tokens of a row.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nlscale.config.errors import require
from nlscale.data.batch import to_batch
from nlscale.data.loader import HeldOut, collate
from nlscale.data.rows import open_rows
from nlscale.hub.heard import answers, losses
from nlscale.hub.opened import Source, opened
from nlscale.runtime.world import World
from nlscale.tasks import TASKS
from nlscale.tasks.trial import Material, Trial

PARTS = 8  # of a row, whose losses are shown
SEED = 0  # of what tasks draw


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked for; raises UserError for what is out of range."""

    rows: int
    longer: int = 1  # rows of so many of training's
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        require(self.rows >= 1, f"--rows {self.rows} must be at least 1")
        require(self.longer >= 1, f"--longer {self.longer} must be at least 1")
        for name in self.tasks:
            require(name in TASKS, f"--tasks {name}: known are {', '.join(TASKS)}; or all")

    def longest(self, sequence: int) -> int:
        """Tokens of the longest row, where training's rows have `sequence`."""
        return max(self.longer * sequence, *(TASKS[name].tokens(sequence) for name in self.tasks), 0)


def evaluate(source: Source, asked: Evaluation, target: str | None) -> None:
    """Prints the losses, and writes them to the JSON file `target`, on rank 0. A collective."""
    source.check_rows(asked.longer)
    sequence = source.run.data.sequence
    run = source.long(asked.longest(sequence))
    with opened(run, source.path) as (model, world):
        document, micro = source.tokeniser.document, source.run.train.micro_batch
        found: dict[str, Any] = {"run": source.run.run.name, "step": source.step, "sequence": asked.longer * sequence}
        rows, made = held_out(source, world, asked), trials(source, world, asked)
        batch = to_batch(rows, document, world.device)
        each = losses(model, batch.tokens_BT, batch.targets_BT, batch.starts_BT, micro, sequence)
        found |= {"rows": len(rows), "loss": mean(each), "by_place": by_place(each)}
        for name, trial in made:
            lines = trial.table(*answers(model, trial, micro, sequence))
            found.setdefault("tasks", []).extend({"task": name, **line} for line in lines)
    if world.leads:
        print(words(found))
        if target is not None:
            Path(target).write_text(json.dumps(found, indent=1) + "\n")


def held_out(source: Source, world: World, asked: Evaluation) -> np.ndarray:
    """Held-out rows (B, T + 1): those that the run's own evaluation takes; or longer ones, of rows that follow one another.

    Raises UserError where there are none.
    """
    data, longer = source.run.data, asked.longer
    if longer == 1:
        return HeldOut(data, asked.rows, 1, world).rows()[0]
    dataset, found = open_rows(data, "heldout", world, 1, False, print), []
    count = dataset.num_samples // longer
    for place in range(count):  # spread over the split, and so over all streams of a mixture
        first = longer * (place * stride(count, asked.rows) % count)
        parts = collate([dataset[first + i] for i in range(longer)])
        follow = (parts[1:, 0] == parts[:-1, -1]).all()  # a row ends with the token that the next one begins with
        if follow and (parts >= 0).all():
            found.append(np.concatenate([parts[:, :-1].reshape(-1), parts[-1, -1:]]))
        if len(found) == asked.rows:
            break
    require(
        bool(found),
        f"no {longer} held-out rows of {data.sources[0].path} follow one another; a smaller --longer would work",
    )
    return np.stack(found)


def stride(count: int, rows: int) -> int:
    """A step by which all of `count` places are passed, the first `rows` of them evenly spread."""
    step = max(1, count // rows)
    while gcd(step, count) > 1:
        step += 1
    return step


def mean(losses_BT: Tensor) -> float:
    """Of all targets; raises UserError where there is none."""
    require(bool(losses_BT.isfinite().any()), "none of the held-out rows can be trusted: nothing is left to evaluate")
    return float(losses_BT.nanmean())


def by_place(losses_BT: Tensor) -> list[dict[str, float]]:
    """Mean losses of equal parts of the row; `first` and `last` token from 1."""
    count = losses_BT.shape[1]
    edges = [i * count // PARTS for i in range(PARTS + 1)]
    return [
        {"first": a + 1, "last": b, "loss": float(losses_BT[:, a:b].nanmean())}
        for a, b in zip(edges, edges[1:], strict=False)
        if b > a
    ]


def trials(source: Source, world: World, asked: Evaluation) -> list[tuple[str, Trial]]:
    """Rows of every task with its name. Raises UserError where the held-out rows do not suffice."""
    if not asked.tasks:
        return []
    found: list[tuple[str, Trial]] = []
    rows = torch.as_tensor(HeldOut(source.run.data, asked.rows, 1, world).rows()[0]).long()
    for name in asked.tasks:
        generator = torch.Generator().manual_seed(SEED)
        material = Material(rows[(rows >= 0).all(1)], source.tokeniser.document, generator)
        found += [(name, trial) for trial in TASKS[name].made(material)]
    return found


def words(found: dict[str, Any]) -> str:
    """What a person reads."""
    rows, loss = found["rows"], found["loss"]
    lines = [
        f"{found['run']}, step {found['step']}: {rows:,} held-out rows of {found['sequence']:,} tokens",
        f"loss {loss:.4f}, perplexity {exp(loss):,.1f}",
        "",
        f"{'tokens of the row':<24}{'loss':>8}",
        *(f"{each['first']:,} to {each['last']:,}".ljust(24) + f"{each['loss']:8.4f}" for each in found["by_place"]),
    ]
    told = found.get("tasks", [])
    for name in dict.fromkeys(line["task"] for line in told):
        own = [line for line in told if line["task"] == name]
        shares = "" if own[0]["right"] is None else "   right  guessed"
        lines += ["", f"{name}: {TASKS[name].about}", f"{'':<44}{'loss':>8}{shares}", *map(answered, own)]
    return "\n".join(lines)


def answered(line: dict[str, Any]) -> str:
    """One line of a task's table."""
    shares = "" if line["right"] is None else f"  {line['right']:6.1%}  {line['guessed']:7.1%}"
    return f"{line['asked']:<44}{line['loss']:8.4f}{shares}"
