"""The task that tells parts of HOPE apart (row 22): its rows are what they say, and no arm is passed off for another."""

import torch

from nlscale.bench.hops import ARMS, CHAINS, MODEL, SYMBOLS, TOKENS, WHOLE, chains, learnt, row
from nlscale.config.read import read
from nlscale.testing import ranks


def test_rows_can_be_answered_from_their_pairs_alone() -> None:
    tokens, targets = chains(64, torch.Generator().manual_seed(3))
    assert tokens.shape == targets.shape == (64, TOKENS)
    for said, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        told, asked = said[: 4 * CHAINS], said[4 * CHAINS :]
        follows = {a: b - SYMBOLS for a, b in zip(told[::2], told[1::2], strict=True)}
        heads = [token - 2 * SYMBOLS - 1 for token in asked[:CHAINS]]
        assert [head + SYMBOLS for head in heads] == [token - 2 * SYMBOLS - 1 for token in asked[CHAINS:]]
        one, two = [follows[head] for head in heads], [follows[follows[head]] for head in heads]
        assert wanted[4 * CHAINS :] == [b + SYMBOLS for b in one + two] and set(wanted[: 4 * CHAINS]) == {2 * SYMBOLS}
    early = [
        row.index(2 * SYMBOLS + 1 + row[0]) < 5 * CHAINS for row in tokens.tolist() if row[0] + 2 * SYMBOLS + 1 in row
    ]
    assert 0 < len(early) < 64  # a row begins with the head of a chain, or with its middle


def test_arms_leave_out_what_they_say() -> None:
    left = {name: read("demo-hope", [*MODEL, said]).model.self_modifying for name, said in ARMS.items()}
    assert len(left[WHOLE].written) == 5 and left[WHOLE].erase and not left["without erasing (DGD)"].erase
    for memory in ("key", "value"):
        assert {*left[WHOLE].written} - {*left[f"{memory}s' memory never written"].written} == {memory}


def test_parts_are_held_to_what_they_are_worth() -> None:
    part = "keys' memory never written"
    assert row(WHOLE, 1, {(WHOLE, 1): (1.0, 0.96)}).ok and not row(WHOLE, 1, {(WHOLE, 1): (1.0, 0.9)}).ok
    for share, ok in ((0.6, True), (0.93, False)):
        assert row(part, 1, {(WHOLE, 1): (1.0, 0.97), (part, 1): (1.0, share)}).ok is ok


def test_a_model_hears_what_is_asked_of_it() -> None:
    """A few steps: what it names where it is asked are symbols, a fifth of all tokens, or it would be right more seldom."""
    ((one, two),) = ranks(1, learnt, 1, [ARMS[WHOLE]], 25)
    assert one + two > 2 / len(range(4 * SYMBOLS + 1))
