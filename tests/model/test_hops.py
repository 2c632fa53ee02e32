"""The task that tells parts of HOPE apart (row 22): its rows are what they say, and no arm is passed off for another."""

import pytest
import torch

from nlscale.bench.drill import apart
from nlscale.bench.hops import ARMS, CHAINS, MODEL, SEEDS, SYMBOLS, TOKENS, WHOLE, chains, learnt, row, table
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
    whole = {(WHOLE, seed): (1.0, share) for seed, share in zip(SEEDS, (0.5, 0.96, 0.99), strict=True)}
    assert row(WHOLE, whole).ok and row(WHOLE, whole).value == 0.96
    assert not row(WHOLE, whole | {(WHOLE, SEEDS[1]): (1.0, 0.9)}).ok
    for shares, ok in (((0.5, 0.9, 0.89), True), ((0.5, 0.96, 0.9), False)):  # the whole's mean: 0.8167
        assert row(part, whole | {(part, s): (1.0, share) for s, share in zip(SEEDS, shares, strict=True)}).ok is ok


def test_what_a_part_is_worth_is_told_with_its_error() -> None:
    assert apart([0.9, 0.7], [1.0, 1.0]) == pytest.approx((-0.2, 0.1)) and apart([1.0], [0.5]) == (0.5, 0.0)
    found = {(name, seed): (1.0, 1.0 if name == WHOLE else 0.7 + 0.1 * seed) for name in ARMS for seed in SEEDS}
    assert row("keys' memory never written", found).unit == "share (-0.100, standard error 0.058)"


def test_the_table_has_every_arm_and_seed() -> None:
    found = {(name, seed): (1.0, 1.0 if name == WHOLE else 0.9) for name in ARMS for seed in SEEDS}
    rows = table(found)
    assert len(rows) == len(ARMS) * (len(SEEDS) + 1) and all(each.ok for each in rows)
    assert {each.target for each in rows} == {"", ">= 0.95", "<= 0.950"}


def test_a_model_learns_what_is_asked_of_it() -> None:
    """In little time it names, where it is asked, one of the four targets that the row named, not any of the eight."""
    ((one, two),) = ranks(1, learnt, 1, [ARMS[WHOLE], "optim.warmup=0.3"], 60)
    assert min(one, two) > 1.5 / SYMBOLS
