"""Auditing a prepared dataset: every shard against its digest, every row against its tokeniser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from nlscale.config.errors import UserError, require
from nlscale.data.card import NAME, SPLITS, Card, load_card
from nlscale.data.mds import DIGEST, row_type


def verify(folder: str) -> list[str]:
    """What is wrong with a dataset, a line each, naming split, shard and sample; empty for a sound one."""
    card = load_card(folder)
    faults: list[str] = []
    for split in SPLITS:
        try:
            shards = index(folder, split)
        except UserError:
            continue  # fingerprint_faults names it
        for shard in shards:
            name = f"{split}/{shard['raw_data']['basename']}"
            faults += [f"{name}: {fault}" for fault in audit(folder, split, shard, card)]
    return faults + list(fingerprint_faults(folder, card))


def index(folder: str, split: str) -> list[dict[str, Any]]:
    """The shards that a split's index.json lists; raises UserError where it is damaged or leads out of its folder."""
    path = Path(folder, split, "index.json")
    try:
        shards = json.loads(path.read_text())["shards"]
        inside = [Path(shard["raw_data"]["basename"]) for shard in shards]
        prints = [shard["raw_data"]["hashes"][DIGEST] for shard in shards]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{split}/index.json: {error}") from None
    for shard in inside:
        require(not shard.is_absolute() and ".." not in shard.parts, f"{split}/index.json: {shard} leads out of it")
    require(all(isinstance(each, str) for each in prints), f"{split}/index.json: a digest is no string")
    return list(shards)


def fingerprint_faults(folder: str, card: Card) -> Iterator[str]:
    """Whether the indexes list what the card stands for; no shard is read."""
    prints = [card.tokeniser_digest, str(card.sequence)]
    for split in SPLITS:
        try:
            shards = index(folder, split)
        except UserError as error:
            yield str(error)
            return
        rows = sum(int(shard["samples"]) for shard in shards)
        if rows != card.rows[split]:
            yield f"{split}/index.json: {rows} rows, the card says {card.rows[split]}"
            return
        for shard in shards:
            prints += [split, shard["raw_data"]["basename"], shard["raw_data"]["hashes"][DIGEST]]
    if xxhash.xxh128_hexdigest("\n".join(prints)) != card.fingerprint:
        yield f"{NAME}: the fingerprint does not match the shards listed"


def audit(folder: str, split: str, shard: dict[str, Any], card: Card) -> Iterator[str]:
    """The faults of one shard."""
    path = Path(folder, split, shard["raw_data"]["basename"])
    if not path.is_file():
        yield "missing"
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        yield f"cannot be read: {error.strerror}"
        return
    if len(content) != shard["raw_data"]["bytes"]:
        yield f"{len(content)} bytes, should be {shard['raw_data']['bytes']}"
        return
    if xxhash.xxh128_hexdigest(content) == shard["raw_data"]["hashes"][DIGEST]:
        return
    yield "digest differs" + "".join(
        f"; sample {i} holds a token that the tokeniser lacks" for i in strange(content, card)[:3]
    )


def strange(content: bytes, card: Card) -> list[int]:
    """Samples of a damaged shard that hold ids outside the vocabulary, or that are not where the shard says."""
    count = int(np.frombuffer(content, np.uint32, 1)[0])
    fitting = min(count, len(content) // 4 - 2)  # the count itself may be wrong
    offsets = np.frombuffer(content, np.uint32, fitting + 1, offset=4)
    kind, length = np.dtype(row_type(card.vocabulary)), card.sequence + 1
    last = len(content) - length * kind.itemsize
    rows = [np.frombuffer(content, kind, length, offset=int(at)) if at <= last else None for at in offsets[:-1]]
    return [i for i, row in enumerate(rows) if row is None or int(row.max()) >= card.vocabulary]
