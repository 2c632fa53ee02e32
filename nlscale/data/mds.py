"""MDS through mosaicml-streaming: what a row is, and writers of packed rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.runtime.absent import absent

with absent("transformers", "torchvision"):
    from streaming import MDSWriter, Stream, StreamingDataset  # noqa: F401
    from streaming.base.dataset import _ShardState
    from streaming.base.shared import prefix  # noqa: F401

LOCAL = _ShardState.LOCAL
COLUMN = "tokens"
DIGEST = "xxh128"


def row_type(vocabulary: int) -> str:
    """The smallest of the dtypes that MDS and torch share for ids below `vocabulary`."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def writer(folder: Path, vocabulary: int, sequence: int, shard_bytes: int) -> Any:
    """A writer of rows of `sequence` + 1 tokens, with a digest a shard."""
    columns = {COLUMN: f"ndarray:{row_type(vocabulary)}:{sequence + 1}"}
    return MDSWriter(out=str(folder), columns=columns, hashes=[DIGEST], size_limit=shard_bytes)


def merge(folder: Path, parts: list[str]) -> list[dict[str, Any]]:
    """Writes the index of a split from its parts' indexes and gives its shards."""
    shards = []
    for part in parts:
        for shard in json.loads((folder / part / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{part}/{shard['raw_data']['basename']}"
            shards.append(shard)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    return shards


def tokens(row: dict[str, Any]) -> np.ndarray:
    """A row's token ids (T + 1,)."""
    return row[COLUMN]
