"""Fast weights: what a level of one sequence has learned inside it, beside the slow weights it began at (spec 2.3).

A level's feed-forward slice has weights W_in (U, D) for each inward part and W_down (U, D). What n written tokens add is

    W_in  -= rate sum_s g_s x_s^T        g: gradient at W_in x, x: the normed input
    W_down -= rate sum_s a_s d_s^T       a: hidden units, d: gradient at the block's output

kept as matrices (`Whole`) or as the pairs themselves (`Factors`; V22), which are smaller while little is written. Both are
values: `written` gives the next one. A document hears nothing of what one before it in the row taught: where another began,
what was learned is not heard any more (`Window.heard`), and goes with the next write.

B rows (1 where all rows share), T tokens of a chunk, D width, U units of this rank.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Tokens' factors of a gradient: left (B, T, U) and right (B, T, D), whose products add up over tokens."""

    left: Tensor
    right: Tensor

    def square(self) -> Tensor:
        """Squared norm of the sum of products, a row: (B,)."""
        return ((self.left @ self.left.mT) * (self.right @ self.right.mT)).sum((1, 2))


@dataclass(frozen=True)
class Documents:
    """Which tokens of a chunk, and of rows that have copies of their own, belong together."""

    heard_BT: Tensor  # their document began before the chunk: they hear what was learned of it
    last_BT: Tensor  # they are of the document that is under way when the chunk ends
    same_B: Tensor  # no document began in the chunk


def documents(starts_BT: Tensor) -> Documents:
    """Of a chunk, true at a document's first token."""
    begun_BT = starts_BT.cumsum(1, dtype=torch.int32)
    return Documents(begun_BT == 0, begun_BT == begun_BT[:, -1:], begun_BT[:, -1] == 0)


@dataclass(frozen=True)
class Whole:
    """The change as a matrix (B, U, D); None: nothing was written."""

    change: Tensor | None = None

    def inward(self, x_BTD: Tensor) -> Tensor | float:
        """What it adds to W x (B, T, U)."""
        return 0.0 if self.change is None else x_BTD @ self.change.mT

    def outward(self, a_BTU: Tensor) -> Tensor | float:
        """What it adds to W^T a (B, T, D)."""
        return 0.0 if self.change is None else a_BTU @ self.change

    def written(self, gathered: "list[Pair] | Tensor", rate: Tensor, alive_B: Tensor | None) -> "Whole":
        """After a step of `rate` (B,) against a gradient; `alive`: rows that keep what they had, None: all."""
        gradient = gathered if isinstance(gathered, Tensor) else product(gathered)
        move = -rate.view(-1, 1, 1) * gradient
        if self.change is None:
            return Whole(move)
        if alive_B is None:
            return Whole(self.change + move)
        return Whole(torch.addcmul(move, self.change, alive_B.view(-1, 1, 1).to(move.dtype)))


@dataclass(frozen=True)
class Factors:
    """The change as pairs, the rates in the left ones."""

    pairs: tuple[Pair, ...] = field(default_factory=tuple)

    def inward(self, x_BTD: Tensor) -> Tensor | float:
        """What it adds to W x (B, T, U)."""
        return sum(((x_BTD @ pair.right.mT) @ pair.left for pair in self.pairs), 0.0)

    def outward(self, a_BTU: Tensor) -> Tensor | float:
        """What it adds to W^T a (B, T, D)."""
        return sum(((a_BTU @ pair.left.mT) @ pair.right for pair in self.pairs), 0.0)

    def written(self, gathered: "list[Pair] | Tensor", rate: Tensor, alive_B: Tensor | None) -> "Factors":
        """After a step of `rate` (B,) against a gradient; `alive`: rows that keep what they had, None: all."""
        assert not isinstance(gathered, Tensor)
        joined = Pair(torch.cat([p.left for p in gathered], 1), torch.cat([p.right for p in gathered], 1))
        keep = None if alive_B is None else alive_B.view(-1, 1, 1)
        kept = self.pairs if keep is None else [replace(pair, left=pair.left * keep) for pair in self.pairs]
        return Factors((*kept, replace(joined, left=-rate.view(-1, 1, 1) * joined.left)))


Fast = Whole | Factors


def product(pairs: list[Pair]) -> Tensor:
    """The sum of products (B, U, D)."""
    return sum((pair.left.mT @ pair.right for pair in pairs[1:]), pairs[0].left.mT @ pairs[0].right)


@dataclass
class Window:
    """What a level has gathered since it last moved: gradients by block and part, and the targets they came from."""

    pairs: dict[tuple[int, str], list[Pair]] = field(default_factory=dict)
    targets: Tensor | float = 0.0  # (B,)
    under_way: list[Tensor] = field(default_factory=list)  # by chunk, (B, T): tokens of the document that goes on
    alive_B: Tensor | None = None  # rows whose document has gone on since the move; None: all

    def heard(self, tokens_BT: Tensor) -> Tensor:
        """Of tokens whose document began before their chunk, those that hear what the level has learned (B, T, 1)."""
        return (tokens_BT if self.alive_B is None else tokens_BT & self.alive_B[:, None]).unsqueeze(-1)

    def go_on(self, documents: Documents) -> None:
        """Takes a chunk in: what was gathered and learned of documents that ended in it counts no longer."""
        self.alive_B = documents.same_B if self.alive_B is None else self.alive_B & documents.same_B
        self.targets = self.targets * documents.same_B
        self.under_way = [*(each & documents.same_B[:, None] for each in self.under_way), documents.last_BT]

    @property
    def gathered(self) -> dict[tuple[int, str], list[Pair]]:
        """Of the documents that go on."""
        if not self.under_way:
            return self.pairs
        masks = [each.unsqueeze(-1) for each in self.under_way]
        return {
            key: [replace(pair, left=pair.left * mask) for pair, mask in zip(pairs, masks, strict=True)]
            for key, pairs in self.pairs.items()
        }
