"""Auditing a prepared dataset: every shard against its digest, every row against its tokeniser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from nlscale.data.card import Card, load_card
from nlscale.data.mds import DIGEST, row_type
from nlscale.data.write import SPLITS


def verify(folder: str) -> list[str]:
    """What is wrong with a dataset, a line each, naming split, shard and sample; empty for a sound one."""
    card = load_card(folder)
    faults: list[str] = []
    prints = [card.tokeniser_digest, str(card.sequence)]
    for split in SPLITS:
        try:
            shards = json.loads(Path(folder, split, "index.json").read_text())["shards"]
        except (OSError, ValueError, KeyError) as error:
            faults.append(f"{split}/index.json: {error}")
            continue
        for shard in shards:
            faults += [
                f"{split}/{shard['raw_data']['basename']}: {fault}" for fault in audit(folder, split, shard, card)
            ]
            prints += [split, shard["raw_data"]["basename"], shard["raw_data"]["hashes"][DIGEST]]
        rows = sum(shard["samples"] for shard in shards)
        if rows != card.rows[split]:
            faults.append(f"{split}/index.json: {rows} rows, the card says {card.rows[split]}")
    if not faults and xxhash.xxh128_hexdigest("\n".join(prints)) != card.fingerprint:
        faults.append("dataset.json: the fingerprint does not match the shards listed")
    return faults


def audit(folder: str, split: str, shard: dict[str, Any], card: Card) -> Iterator[str]:
    """The faults of one shard."""
    path = Path(folder, split, shard["raw_data"]["basename"])
    if not path.is_file():
        yield "missing"
        return
    content = path.read_bytes()
    if len(content) != shard["raw_data"]["bytes"]:
        yield f"{len(content)} bytes, should be {shard['raw_data']['bytes']}"
        return
    if xxhash.xxh128_hexdigest(content) == shard["raw_data"]["hashes"][DIGEST]:
        return
    yield "digest differs" + "".join(
        f"; sample {i} holds a token that the tokeniser lacks" for i in strange(content, card)
    )


def strange(content: bytes, card: Card) -> list[int]:
    """Samples of a shard that hold ids outside the vocabulary."""
    count = int(np.frombuffer(content, np.uint32, 1)[0])
    offsets = np.frombuffer(content, np.uint32, count + 1, offset=4)
    kind = np.dtype(row_type(card.vocabulary))
    rows = (np.frombuffer(content, kind, card.sequence + 1, offset=int(start)) for start in offsets[:-1])
    return [i for i, row in enumerate(rows) if int(row.max()) >= card.vocabulary]
