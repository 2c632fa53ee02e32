"""Reading on: rows that come in parts of any length, and what the network says of each token as it comes (spec B32).

What it says is what it would have said to the whole rows in one pass: attention goes on from its keys and values, a memory
from its state, which it moves at the ends of its chunks alone, as in training; tokens of a chunk that is not whole yet wait
beside it. So a token costs a memory the same wherever in the row it stands.

Levels that move inside rows learn as they read: a chunk's loss is known, and moves them, once the token after it has come.

B rows, T tokens of a part, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nlscale.model.fast import Documents, Window
from nlscale.model.hope import Hope
from nlscale.model.in_sequence import HopeInSequence, heard


class Reader:
    """Rows that a network is reading; it holds the whole network and, of a row, all its tokens (one rank, or several that
    share each by tensor parallelism).
    """

    def __init__(self, model: Hope, rows: int) -> None:
        self.model = model
        self.starts = torch.zeros(rows, 0, dtype=torch.bool, device=model.cosine.device)
        self.left: list[Any] | None = None  # what the blocks hand on, in the order in which they are passed

    @property
    def past(self) -> int:
        """Tokens that were read."""
        return self.starts.shape[1]

    def read(self, tokens_BT: Tensor, starts_BT: Tensor) -> Tensor:
        """The network's last states of these tokens (T, B, D), from which `predicted` says what comes next.

        Raises ValueError where the row grows longer than the positions that the model was built with.
        """
        longest, past = self.model.cosine.shape[0], self.past
        if past + tokens_BT.shape[1] > longest:
            raise ValueError(
                f"{past + tokens_BT.shape[1]} tokens of a row were read; the model was built for {longest}"
            )
        self.starts = torch.cat([self.starts, starts_BT], 1)
        with torch.no_grad():
            return self.passed(self.model.enter(tokens_BT), tokens_BT, past)

    def predicted(self, x_TBD: Tensor) -> Tensor:
        """Scores of every token of the vocabulary to come next (T, B, V), in float32 at least."""
        with torch.no_grad():
            return self.model.head.logits(x_TBD)

    def passed(self, x_TBD: Tensor, tokens_BT: Tensor, past: int) -> Tensor:
        """Through all blocks."""
        place = self.model.scene(self.starts, past, hand_on=True)
        x_TBD, self.left = self.model.walk(x_TBD, place, self.left)
        return x_TBD


class LearningReader(Reader):
    """Of a network whose last layers learn while they read."""

    model: HopeInSequence

    def __init__(self, model: HopeInSequence, rows: int) -> None:
        """Raises ValueError for a model whose inner moves keep what a meta-gradient needs, which grows with the row."""
        super().__init__(model, rows)
        if model.inner.meta == "full":
            raise ValueError("a network with model.inner.meta=full keeps all of a row; first_order reads the same")
        self.copies = model.untouched()
        self.windows = {level.name: Window() for level in model.rhythm.levels}
        self.lower: list[Any] = [None] * model.first
        self.upper: list[Any] = [None] * (len(model.blocks) - model.first)
        self.at_begin = self.upper  # of the chunk under way
        # Its tokens (B, t), and what the learning layers were given of them (t, B, D).
        self.chunk: list[tuple[Tensor, Tensor]] = []

    def passed(self, x_TBD: Tensor, tokens_BT: Tensor, past: int) -> Tensor:
        """Through all blocks; the last ones stop at the end of each chunk to learn from it."""
        model, size, said = self.model, self.model.rhythm.chunk, []
        place = model.scene(self.starts, past, hand_on=True)
        for i, block in enumerate(model.blocks[: model.first]):
            x_TBD, self.lower[i] = block(x_TBD, place, self.lower[i])
        first, count = past, past + tokens_BT.shape[1]
        while first < count:
            if first and first % size == 0:
                self.learn(tokens_BT[:, first - past], first)
            last = min(count, (first // size + 1) * size)
            here = slice(first - past, last - past)
            place, own = model.scene(self.starts[:, :last], first, hand_on=True), self.documents(last)
            said_to = heard(own and replace(own, heard_BT=own.heard_BT[:, first - last :]), self.windows)
            x, _, self.upper = model.pass_on(x_TBD[here], place, self.upper, self.copies, said_to)
            self.chunk.append((tokens_BT[:, here], x_TBD[here]))
            said.append(x)
            first = last
        return torch.cat(said)

    def learn(self, after_B: Tensor, end: int) -> None:
        """Moves the levels that are due after `end` tokens, by the loss of the chunk that ends there; `after`: the token
        that came next.
        """
        model, begin = self.model, end - self.model.rhythm.chunk
        tokens, given = (
            torch.cat(parts, axis) for parts, axis in zip(zip(*self.chunk, strict=True), (1, 0), strict=True)
        )
        targets = torch.cat([tokens[:, 1:], after_B[:, None]], 1)
        with torch.enable_grad():
            place, own = model.scene(self.starts[:, :end], begin, hand_on=True), self.documents(end)
            x, traces, _ = model.pass_on(given, place, self.at_begin, self.copies, heard(own, self.windows))
            loss = model.head(x, targets)
            self.copies = model.learned(loss, traces, targets, own, self.windows, self.copies, end)
        self.at_begin, self.chunk = self.upper, []

    def documents(self, last: int) -> Documents | None:
        """Those of the chunk under way, of which tokens up to `last` are read."""
        size = self.model.rhythm.chunk
        return self.model.documents(self.starts[:, (last - 1) // size * size : last])


def reader(model: Hope, rows: int = 1) -> Reader:
    """What reads so many rows by a model."""
    return LearningReader(model, rows) if isinstance(model, HopeInSequence) else Reader(model, rows)


def held(value: Any) -> int:
    """Bytes of memory behind all tensors of what a reader holds of its rows."""
    return sum(storage.nbytes() for storage in {each.data_ptr(): each for each in storages(value)}.values())


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Of every tensor in a value."""
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, dict):
        yield from (found for each in value.values() for found in storages(each))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from (found for each in value for found in storages(each))
    elif hasattr(value, "__dataclass_fields__"):
        yield from storages(vars(value))
