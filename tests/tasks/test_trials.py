"""Memory tasks: who only looks up what the row said where it last said the same knows what can be known, and no more."""

from collections.abc import Callable
from re import fullmatch

import pytest
import torch
from torch import Tensor

from nlscale.config.errors import UserError
from nlscale.tasks import TASKS
from nlscale.tasks.trial import Material, Trial

ROWS, SEQUENCE, SYMBOLS = 16, 64, 400


def material(rows: int = ROWS, symbols: int = SYMBOLS) -> Material:
    generator = torch.Generator().manual_seed(0)
    return Material(torch.randint(1, symbols, (rows, SEQUENCE + 1), generator=generator), 0, generator)


def looked_up(row: Tensor, place: int) -> int:
    """What came after the longest part of the row that ends as the row does at this place; the newest of them."""
    said, best, found = row.tolist(), 0, -1
    for earlier in range(place):
        same = 0
        while same <= earlier and said[earlier - same] == said[place - same]:
            same += 1
        if same and same >= best:
            best, found = same, said[earlier + 1]
    return found


def known(trial: Trial) -> dict[str, float]:
    """Share of what is asked that looking up finds, by name."""
    right = torch.zeros_like(trial.asked_BT, dtype=torch.bool)
    for b, t in (trial.asked_BT >= 0).nonzero().tolist():
        right[b, t] = looked_up(trial.tokens_BT[b], t) == trial.tokens_BT[b, t + 1]
    lines = trial.table(torch.zeros(right.shape), right)
    return {line["asked"]: line["right"] for line in lines}


def all_known(name: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for trial in TASKS[name].made(material()):
        shares |= known(trial)
    return shares


def test_a_row_that_is_said_again_is_known() -> None:
    shares = all_known("recall")
    assert list(shares) == ["at first", *(f"again after {n} tokens" for n in (0, 64, 192))]
    assert shares.pop("at first") < 0.1 and min(shares.values()) > 0.95


def test_needles_are_found_where_they_were_told() -> None:
    shares = all_known("needle")
    assert list(shares) == ["16 tokens later", "64 tokens later", "192 tokens later", "never told"]
    assert shares.pop("never told") < 0.1 and min(shares.values()) == 1


def test_a_needle_lies_so_far_back() -> None:
    """From the end of the last needle to the key that asks first; all four are asked."""
    for trial, far in zip(TASKS["needle"].made(material()), (16, 64, 192), strict=False):
        asked = (trial.asked_BT[0] >= 0).nonzero().flatten()
        assert asked.diff().tolist() == [4, 4, 4] and asked[-1] == trial.tokens_BT.shape[1] - 2
        first = int(asked[0]) - 2  # of the key's three tokens
        said = trial.tokens_BT.tolist()
        told = [next(p for p in range(first) if row[p : p + 3] == row[first : first + 3]) for row in said]
        assert {(first - far - place) % 4 for place in told} == {0} and max(told) == first - far - 4


def test_pairs_are_known_once_they_were_seen() -> None:
    shares = all_known("adaptation")
    assert list(shares) == ["seen 0 times", "seen 1 time", "seen 2 times"]
    assert shares.pop("seen 0 times") < 0.1 and min(shares.values()) == 1


def test_tasks_that_ended_are_asked_in_the_end() -> None:
    shares = all_known("continual")
    assert len(shares) == 8 and min(shares.values()) == 1
    (trial,) = TASKS["continual"].made(material())
    assert trial.choices_BTK is not None
    for b, t in (trial.asked_BT >= 0).nonzero().tolist():
        names, row = trial.choices_BTK[b, t].tolist(), trial.tokens_BT[b].tolist()
        assert len(set(names)) == 4 and row[t + 1] in names
        task = trial.asked_BT[b, t] // 2
        told = {place for place, token in enumerate(row[: -2 * 16]) if token == row[t]}
        assert {place // 16 for place in told} == {int(task)}  # in its own turn and never else


def test_words_that_were_told_are_known_and_longer_ones_are_not() -> None:
    """Parity's words are too many to come again."""
    shares = all_known("states")
    assert list(shares)[:2] == ["parity, words of 1 to 8 letters", "parity, 9 to 16"] and len(shares) == 6
    assert shares["(aa)*, words of 1 to 8 letters"] == shares["(abab)*, words of 1 to 8 letters"] == 1
    assert all(shares[f"{language}, 9 to 16"] < 0.85 for language in ("parity", "(aa)*", "(abab)*"))


def test_a_word_is_followed_by_whether_it_is_in_the_language() -> None:
    for trial, pattern in zip(TASKS["states"].made(material()), ("", "(aa)*", "(abab)*"), strict=True):
        for row, asked in zip(trial.tokens_BT.tolist(), trial.asked_BT.tolist(), strict=True):
            opening, words, at = row[0], [], 0
            while at < len(row):
                end = at + 1 + row[at + 1 :].index(closing(row, opening))
                assert row[at] == opening
                words.append((row[at + 1 : end], row[end + 1], asked[end]))
                at = end + 2
            letters = {letter for word, _, _ in words for letter in word}
            heard = [{(told(word, letter, pattern), answer) for word, answer, _ in words} for letter in letters]
            assert any(len(means) == 2 == len({answer for _, answer in means}) for means in heard), heard
            assert sorted(len(word) for word, _, _ in words) == sorted([*(2 * list(range(1, 9))), *range(9, 17)])
            assert [name for *_, name in words] == [-1] * 8 + [0] * 8 + [1] * 8
            assert all(len(word) > 8 for word, _, _ in words[-8:])


def closing(row: list[int], opening: int) -> int:
    """The token two places before every later opening one."""
    return row[row.index(opening, 1) - 2]


def told(word: list[int], counted: int, pattern: str) -> bool:
    """Whether a word is in the language; of parity, one of the letters is counted."""
    if pattern:
        return fullmatch(pattern, "".join("a" if letter == word[0] else "b" for letter in word)) is not None
    return word.count(counted) % 2 == 0


def test_a_cipher_has_a_word_for_a_word() -> None:
    given = material(symbols=60)
    shifted, alone = TASKS["shift"].made(given)
    plain = torch.cat([given.text[:, :-1].roll(-1, 0), given.text[:, :-1].roll(-2, 0)], 1)
    assert torch.equal(shifted.tokens_BT[:, SEQUENCE:], alone.tokens_BT)
    assert torch.equal(shifted.tokens_BT[:, :SEQUENCE], given.text[:, :-1])
    words = {(int(a), int(b)) for a, b in zip(plain.flatten(), alone.tokens_BT.flatten(), strict=True)}
    assert len(words) == len({a for a, _ in words}) == len({b for _, b in words}) == 59
    assert sum(a != b for a, b in words) > 50
    assert (shifted.asked_BT[:, : SEQUENCE - 1] == 0).all() and (shifted.asked_BT[:, SEQUENCE - 1] == -1).all()
    assert (shifted.asked_BT[:, SEQUENCE:-1] > 0).all() and len(shifted.names) == 5 and len(alone.names) == 4


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("sequence", [16, 64, 200])
def test_rows_are_no_longer_than_they_say(name: str, sequence: int) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 50, (4, sequence + 1), generator=generator)
    trials = TASKS[name].made(Material(text, 0, generator))
    assert max(trial.tokens_BT.shape[1] for trial in trials) == TASKS[name].tokens(sequence)
    for trial in trials:
        assert (trial.tokens_BT > 0).all() and (trial.asked_BT[:, -1] == -1).all()
        assert trial.asked_BT.unique().tolist() == [
            *([-1] if (trial.asked_BT < 0).any() else []),
            *range(len(trial.names)),
        ]
        assert (trial.choices_BTK is None) == (trial.guessed is None)


def refused(made: Callable[[], object], answer: str) -> bool:
    with pytest.raises(UserError, match=answer):
        made()
    return True


def test_too_little_text_is_refused() -> None:
    assert refused(lambda: material(rows=3), "--tasks needs 4 held-out rows, and has 3; a larger --rows would do")
    few = "--tasks needs 32 different tokens, and the held-out rows have 9; a larger --rows might do"
    assert refused(lambda: TASKS["continual"].made(material(symbols=10)), few)
