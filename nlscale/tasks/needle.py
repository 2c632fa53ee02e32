"""Needles in a haystack: four keys with a value each stand in held-out text; later the keys come again, in another order.

(RULER's multi-key needles, Hsieh et al., 2024, in tokens.) What a window of attention does not reach, a memory must hold. A
key is three tokens, so that none of them says it alone; the answer is one of the four values.
"""

import torch
from torch import Tensor

from nlscale.tasks.trial import Material, Trial, among, nowhere

NEEDLES, KEY = 4, 3
ABOUT = f"{NEEDLES} keys with a value each stand in text; later the keys come again"


def distances(sequence: int) -> tuple[int, ...]:
    """Tokens between the last needle and the first question."""
    return sequence // 4, sequence, 3 * sequence


def tokens(sequence: int) -> int:
    """Of the longest row."""
    return sequence // 8 + distances(sequence)[-1] + 2 * NEEDLES * (KEY + 1)


def made(material: Material) -> list[Trial]:
    """A trial for each distance, and one in which other keys and values were told, so that nothing can be known."""
    near, *further = distances(material.sequence)
    told, untold = pairs(material), pairs(material)
    return [
        *(row(material, told, told, far, f"{far:,} tokens later") for far in (near, *further)),
        row(material, untold, told, near, "never told"),
    ]


def pairs(material: Material) -> Tensor:
    """Keys, each with its value as its last token (B, NEEDLES, KEY + 1)."""
    return material.drawn(NEEDLES * (KEY + 1)).unflatten(1, (NEEDLES, KEY + 1))


def row(material: Material, told: Tensor, wanted: Tensor, far: int, name: str) -> Trial:
    """Text, the needles, text, and the keys that are `wanted` with their values."""
    order, head = material.order(NEEDLES), material.sequence // 8
    text, questions = material.other(head + far), wanted.gather(1, order[..., None].expand_as(wanted))
    said = torch.cat([text[:, :head], told.flatten(1), text[:, head:], questions.flatten(1)], 1)
    asked = nowhere(said)
    asked[:, head + told[0].numel() + far + KEY - 1 :: KEY + 1] = 0
    return Trial(said, asked, [name], among(said, wanted[..., -1]), 1 / NEEDLES)
