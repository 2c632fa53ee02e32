"""A shift (spec E4): text goes on as text by a cipher, every token replaced by another, the same one each time.

What was learned of the text misleads now; who learns while reading finds the new words. The same text by the same cipher at
a row's beginning shows what it costs when nothing misleads.
"""

from itertools import pairwise

import torch

from nlscale.tasks.trial import Material, Trial, nowhere

ABOUT = "text goes on by a cipher"
AFTER = 2  # rows by the cipher


def tokens(sequence: int) -> int:
    """Of the longest row."""
    return (AFTER + 1) * sequence


def made(material: Material) -> list[Trial]:
    """A trial with the shift in it, and one that begins with it."""
    pool = material.pool
    cipher = torch.arange(int(material.text.max()) + 1)
    cipher[pool] = pool[torch.randperm(len(pool), generator=material.generator)]
    before, after = material.text[:, :-1], cipher[material.other(AFTER * material.sequence)]
    return [trial(torch.cat([before, after], 1), material.sequence, ""), trial(after, 0, ", nothing before it")]


def trial(said: torch.Tensor, first: int, how: str) -> Trial:
    """Asks every token: before `first`, and in parts that grow after it."""
    asked, length = nowhere(said), said.shape[1] - first
    names = ["before the shift"] if first else []
    asked[:, : max(0, first - 1)] = 0
    edges = [0, *(length // 2**n for n in (3, 2, 1, 0))]
    for a, b in pairwise(edges):
        known = max(1, a)  # by the cipher: what the first one is cannot be said of any
        asked[:, first + known - 1 : first + b - 1] = len(names)
        names.append(f"tokens {known + 1:,} to {b:,} after it{how}")
    return Trial(said, asked, names)
