"""Continual learning inside a row (spec E8): four tasks of four pairs come one after the other; then all are asked.

A task's pairs are told until its turn is over, and not again before the end. What was known when a task ended and is not in
the end was forgotten.
"""

import torch

from nlscale.tasks.trial import Material, Trial, nowhere

COUNT, PAIRS = 4, 4
ABOUT = f"{COUNT} tasks of {PAIRS} pairs come one after the other, then all are asked among their task's values"


def times(sequence: int) -> int:
    """How often a task's pairs are told."""
    return max(2, sequence // (2 * COUNT * PAIRS))


def tokens(sequence: int) -> int:
    """Of a row."""
    return 2 * COUNT * PAIRS * (times(sequence) + 1)


def made(material: Material) -> list[Trial]:
    """One trial."""
    count = times(material.sequence)
    drawn = material.drawn(2 * COUNT * PAIRS).unflatten(1, (2, COUNT, PAIRS))
    keys, values = drawn[:, 0], drawn[:, 1]
    said, asked, choices = [], [], []

    def say(task: int, order: torch.Tensor, name: int) -> None:
        """Pairs of a task in an order (B, n); what is asked with each key."""
        pairs = torch.stack([keys[:, task].gather(1, order), values[:, task].gather(1, order)], 2).flatten(1)
        said.append(pairs)
        asked.append(nowhere(pairs))
        asked[-1][:, ::2] = name
        choices.append(values[:, task, None].expand(*pairs.shape, PAIRS))

    for task in range(COUNT):
        for turn in range(count):
            say(task, material.order(PAIRS), 2 * task if turn == count - 1 else -1)
    for pair in range(PAIRS):  # in the end, tasks in turn
        for task in range(COUNT):
            say(task, torch.full((material.rows, 1), pair), 2 * task + 1)
    names = [name for n in range(1, COUNT + 1) for name in (f"task {n}, when it ended", f"task {n}, in the end")]
    return [Trial(torch.cat(said, 1), torch.cat(asked, 1), names, torch.cat(choices, 1), 1 / PAIRS)]
