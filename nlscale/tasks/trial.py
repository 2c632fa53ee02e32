"""What a task is made of and what it makes: rows, the places where something is asked, the answers to choose among.

B rows, T tokens of a row, K answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nlscale.config.errors import require

LEAST = 4  # rows of text that tasks are made of


@dataclass(frozen=True)
class Material:
    """Held-out rows (B, T + 1), the same number of task rows to make, and the tokens that occur there.

    Raises UserError where there are too few.
    """

    text: Tensor
    document: int  # the token that begins one, which no task says
    generator: torch.Generator

    def __post_init__(self) -> None:
        require(
            self.rows >= LEAST, f"--tasks needs {LEAST} held-out rows, and has {self.rows}; a larger --rows would do"
        )

    @property
    def rows(self) -> int:
        """B."""
        return len(self.text)

    @property
    def sequence(self) -> int:
        """T of training."""
        return self.text.shape[1] - 1

    @cached_property
    def pool(self) -> Tensor:
        """Tokens that occur in the text."""
        return torch.tensor([token for token in self.text.unique().tolist() if token != self.document])

    def drawn(self, count: int) -> Tensor:
        """Tokens of the pool (B, count), all of a row different. Raises UserError where the pool has too few."""
        pool = self.pool
        require(
            len(pool) >= count,
            f"--tasks needs {count} different tokens, and the held-out rows have {len(pool)}; a larger --rows might do",
        )
        return pool[self.order(len(pool))[:, :count]]

    def order(self, count: int) -> Tensor:
        """A random order of so many things in each row (B, count)."""
        return torch.rand(self.rows, count, generator=self.generator).argsort(1)

    def other(self, tokens: int) -> Tensor:
        """Text (B, tokens) of other rows than a row's own, one after the other."""
        count = -(-tokens // self.sequence)
        parts = [self.text[:, :-1].roll(-1 - i, 0) for i in range(count)]
        return torch.cat(parts, 1)[:, :tokens] if parts else self.text[:, :0]


@dataclass(frozen=True)
class Trial:
    """Rows that a network reads, each as one document, and what is asked of it on the way."""

    tokens_BT: Tensor
    asked_BT: Tensor  # what the token after this one answers, by its place in `names`; -1: nothing
    names: Sequence[str]
    choices_BTK: Tensor | None = None  # tokens to choose among, the right one with them; None: the loss counts alone
    guessed: float | None = None  # share of right answers of who knows nothing

    @property
    def targets_BT(self) -> Tensor:
        """The token after each; -1 where nothing is asked."""
        after = torch.cat([self.tokens_BT[:, 1:], self.tokens_BT[:, :1]], 1)
        return after.masked_fill(self.asked_BT < 0, -1)

    def table(self, loss_BT: Tensor, right_BT: Tensor | None) -> list[dict[str, Any]]:
        """Means of each thing that was asked: of the losses, and the share of right choices."""
        found = []
        for place, name in enumerate(self.names):
            here = self.asked_BT == place
            right = None if right_BT is None else float(right_BT[here].double().mean())
            line = {"asked": name, "loss": float(loss_BT[here].double().mean()), "right": right}
            found.append(line | {"guessed": self.guessed, "answers": int(here.sum())})
        return found


def nowhere(tokens_BT: Tensor) -> Tensor:
    """Asks nothing yet."""
    return torch.full_like(tokens_BT, -1)


def among(tokens_BT: Tensor, answers_BK: Tensor) -> Tensor:
    """The same answers to choose among at every place of a row."""
    return answers_BK[:, None].expand(*tokens_BT.shape, answers_BK.shape[1])
