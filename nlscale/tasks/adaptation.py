"""Rapid adaptation (spec E5): eight pairs of a key and a value, drawn anew for every row, come again and again.

How many times must a pair be seen before its value is known?
"""

import torch

from nlscale.tasks.trial import Material, Trial, among, nowhere

PAIRS = 8
ABOUT = f"{PAIRS} pairs, new in every row, come again and again"


def times(sequence: int) -> int:
    """How often every pair comes."""
    return max(4, sequence // (2 * PAIRS))


def tokens(sequence: int) -> int:
    """Of a row."""
    return 2 * PAIRS * times(sequence)


def made(material: Material) -> list[Trial]:
    """One trial, asked at every power of two."""
    count = times(material.sequence)
    drawn = material.drawn(2 * PAIRS)
    pairs = torch.stack([drawn[:, :PAIRS], drawn[:, PAIRS:]], 2)
    rounds = [pairs.gather(1, material.order(PAIRS)[..., None].expand_as(pairs)).flatten(1) for _ in range(count)]
    said = torch.cat(rounds, 1)
    asked, seen = nowhere(said), [n for n in range(count) if n & (n - 1) == 0]
    for place, n in enumerate(seen):
        asked[:, 2 * PAIRS * n : 2 * PAIRS * (n + 1) : 2] = place
    names = [f"seen {n} time{'s' * (n != 1)}" for n in seen]
    return [Trial(said, asked, names, among(said, drawn[:, PAIRS:]), 1 / PAIRS)]
