"""Recall: a row of text is said twice in one document. Who remembers it loses less the second time."""

import torch

from nlscale.tasks.trial import Material, Trial, nowhere

ABOUT = "a row of text is said again"
APART = (0, 1, 3)  # rows between


def tokens(sequence: int) -> int:
    """Of the longest row."""
    return (APART[-1] + 2) * sequence


def made(material: Material) -> list[Trial]:
    """A trial for each distance, the text in between from other rows."""
    row, sequence, found = material.text[:, :-1], material.sequence, []
    for apart in APART:
        said = torch.cat([row, material.other(apart * sequence), row], 1)
        asked, names = nowhere(said), [f"again after {apart * sequence:,} tokens"]
        if not apart:
            asked[:, : sequence - 1] = 0
            names = ["at first", *names]
        asked[:, -sequence:-1] = len(names) - 1
        found.append(Trial(said, asked, names))
    return found
