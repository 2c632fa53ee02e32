"""State tracking (spec E6): words in brackets, each followed by whether it is in a language; then longer words.

Parity of random bits, (aa)* and (abab)* (Bhattamishra et al., 2020). Letters, brackets and answers are tokens drawn for each
row, so that what they mean is to be found in it. Who remembers words knows the short ones when they come again; only who
carries a state along a word knows the longer ones, which are new.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nlscale.tasks.trial import Material, Trial, among

SHORT = 8  # letters of the words that are told, each length once a round; then twice as many once
AROUND = 3  # tokens of a word beside its letters: brackets, answer
ABOUT = "words in brackets, each followed by whether it is in a language"

Word = Callable[[int, torch.Generator], tuple[list[int], bool]]


def rounds(sequence: int) -> int:
    """Of short words."""
    return max(2, sequence // (8 * SHORT))


def tokens(sequence: int) -> int:
    """Of a row."""
    return rounds(sequence) * length(range(1, SHORT + 1)) + length(range(SHORT + 1, 2 * SHORT + 1))


def length(letters: range) -> int:
    """Tokens of words of so many letters."""
    return sum(letters) + AROUND * len(letters)


def parity(letters: int, generator: torch.Generator) -> tuple[list[int], bool]:
    """Random bits; whether their sum is even."""
    bits = torch.randint(0, 2, (letters,), generator=generator).tolist()
    return bits, sum(bits) % 2 == 0


def even(letters: int, _: torch.Generator) -> tuple[list[int], bool]:
    """(aa)*."""
    return [0] * letters, letters % 2 == 0


def fours(letters: int, _: torch.Generator) -> tuple[list[int], bool]:
    """(abab)*."""
    return [n % 2 for n in range(letters)], letters % 4 == 0


LANGUAGES: dict[str, tuple[Word, float]] = {  # and how often the commoner answer is right
    "parity": (parity, 1 / 2),
    "(aa)*": (even, 1 / 2),
    "(abab)*": (fours, 3 / 4),
}


def made(material: Material) -> list[Trial]:
    """A trial for each language."""
    return [trial(material, name, word, guessed) for name, (word, guessed) in LANGUAGES.items()]


def trial(material: Material, language: str, word: Word, guessed: float) -> Trial:
    """Rounds of short words, of which the last is asked, and a round of longer ones, which all are."""
    drawn, count, said, asked = material.drawn(6), rounds(material.sequence), [], []
    for row in drawn:
        told: list[Tensor] = []
        places: list[int] = []
        for turn in range(count + 1):
            lengths = 1 + torch.randperm(SHORT, generator=material.generator) + SHORT * (turn == count)
            for letters in lengths.tolist():
                bits, answer = word(letters, material.generator)
                told.append(row[[2, *bits, 3, 4 + answer]])
                places += [-1] * (letters + 1) + [turn - count + 1 if turn >= count - 1 else -1] + [-1]
        said.append(torch.cat(told))
        asked.append(torch.tensor(places))
    tokens_BT, asked_BT = torch.stack(said), torch.stack(asked)
    names = [f"{language}, words of 1 to {SHORT} letters", f"{language}, {SHORT + 1} to {2 * SHORT}"]
    return Trial(tokens_BT, asked_BT, names, among(tokens_BT, drawn[:, 4:]), guessed)
