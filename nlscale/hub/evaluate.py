"""`nlscale eval`: what a checkpoint's network loses on held-out rows, by the place in the row, and on what was said before.

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
import torch.nn.functional as F
from torch import Tensor

from nlscale.config.errors import require
from nlscale.data.batch import to_batch
from nlscale.data.loader import HeldOut, collate
from nlscale.data.rows import open_rows
from nlscale.hub.opened import Source, opened
from nlscale.model.hope import Hope
from nlscale.model.reader import reader
from nlscale.runtime.world import World

PARTS = 8  # of a row, whose losses are shown
ALIVE = 2**24  # logits at a time, of this rank's part of the vocabulary
TASKS = ("recall",)
APART = (0, 1, 3)  # rows between what is said and the same said again


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
            require(name in TASKS, f"--tasks {name}: known are {', '.join(TASKS)}")

    @property
    def most(self) -> int:
        """Rows of training's length that the longest row is made of."""
        return max(self.longer, APART[-1] + 2 if "recall" in self.tasks else 1)


def evaluate(source: Source, asked: Evaluation, target: str | None) -> None:
    """Prints the losses, and writes them to the JSON file `target`, on rank 0. A collective."""
    sequence, run = source.run.data.sequence, source.long(asked.most * source.run.data.sequence)
    with opened(run, source.path) as (model, world):
        document, micro = source.tokeniser.document, source.run.train.micro_batch
        found: dict[str, Any] = {"run": source.run.run.name, "step": source.step, "sequence": asked.longer * sequence}
        rows = held_out(source, world, asked)
        batch = to_batch(rows, document, world.device)
        each = losses(model, batch.tokens_BT, batch.targets_BT, batch.starts_BT, micro, sequence)
        found |= {"rows": len(rows), "loss": mean(each), "by_place": by_place(each)}
        if "recall" in asked.tasks:
            found["recall"] = recall(model, source, world, asked.rows)
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


def losses(model: Hope, tokens: Tensor, targets: Tensor, starts: Tensor, rows: int, piece: int) -> Tensor:
    """Loss of every target (B, T) in float64, NaN where there is none. `rows` are read at a time, `piece` tokens at once."""
    found = []
    for i in range(0, len(tokens), rows):
        reading, parts = reader(model, len(tokens[i : i + rows])), []
        for first in range(0, tokens.shape[1], piece):
            here = slice(i, i + rows), slice(first, first + piece)
            x, wanted = reading.read(tokens[here], starts[here]), targets[here]
            parts.append(torch.full(wanted.shape, torch.nan, dtype=torch.float64, device=wanted.device))
            size = max(1, ALIVE // (len(wanted) * model.head.weight.shape[0]))
            for some in range(0, x.shape[0], size) if bool((wanted >= 0).any()) else ():
                span = slice(some, some + size)
                logits = reading.predicted(x[span]).permute(1, 2, 0)
                each = F.cross_entropy(logits, wanted[:, span], reduction="none", ignore_index=-1).double()
                parts[-1][:, span] = each.masked_fill(wanted[:, span] < 0, torch.nan)
        found.append(torch.cat(parts, 1).cpu())
    return torch.cat(found)


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


def recall(model: Hope, source: Source, world: World, count: int) -> list[dict[str, float]]:
    """Loss of rows that were said before in the same document, with none or some other rows between: a network that
    remembers them loses less than at the first time. Raises UserError where there are too few rows to come between.
    """
    sequence, micro = source.run.data.sequence, source.run.train.micro_batch
    rows, least = HeldOut(source.run.data, count, 1, world).rows()[0], APART[-1] + 1
    require(
        len(rows) >= least, f"--tasks recall needs {least} held-out rows, and has {len(rows)}; a larger --rows would do"
    )
    batch = to_batch(rows, source.tokeniser.document, world.device)
    first = losses(model, batch.tokens_BT, batch.targets_BT, torch.zeros_like(batch.starts_BT), micro, sequence)
    found: list[dict[str, float]] = []
    for apart in APART:
        between = [batch.tokens_BT.roll(-1 - i, 0) for i in range(apart)]
        tokens = torch.cat([batch.tokens_BT, *between, batch.tokens_BT], 1)
        targets = torch.cat([torch.full_like(tokens[:, :-sequence], -1), batch.targets_BT], 1)
        again = losses(model, tokens, targets, torch.zeros_like(tokens, dtype=torch.bool), micro, sequence)
        found.append({"tokens_between": apart * sequence, "loss": mean(again), "first_time": mean(first)})
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
    if "recall" in found:
        lines += ["", f"{'said again after':<24}{'loss':>8}  the first time"]
        for each in found["recall"]:
            lines.append(
                f"{each['tokens_between']:,} tokens".ljust(24) + f"{each['loss']:8.4f}  {each['first_time']:.4f}"
            )
    return "\n".join(lines)
