"""MDS through mosaicml-streaming: writers of packed rows, and readers that give a replica its rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.config.data import Data
from nlscale.config.errors import require
from nlscale.runtime.alone import alone_on_node
from nlscale.runtime.vision import declare_operators
from nlscale.runtime.world import World

VISION = declare_operators()  # before streaming is imported, and for as long as it lives

from streaming import MDSWriter, Stream, StreamingDataset  # noqa: E402

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


def open_rows(data: Data, split: str, world: World, rows: int, shuffle: bool) -> StreamingDataset:
    """The rows of a split for this rank's replica, `rows` a step. A collective over all ranks.

    The ranks of one replica are neighbours and read the same rows. The order of the global batches depends on
    `data.canonical_nodes`, `shuffle_block` and `shuffle_seed` alone.
    """
    streams = [
        Stream(local=source.path, split=split, proportion=source.weight if len(data.sources) > 1 else None)
        for source in data.sources
    ]
    replication = world.size // world.replicas
    with alone_on_node(world.local_rank):  # streaming looks for free names of shared memory, then takes them
        dataset = StreamingDataset(
            streams=streams,
            batch_size=rows,
            shuffle=shuffle,
            shuffle_seed=data.shuffle_seed,
            shuffle_block_size=data.shuffle_block,
            num_canonical_nodes=data.canonical_nodes,
            replication=replication if replication > 1 else None,
        )
    require(len(dataset) > 0, f"{data.sources[0].path}: split {split} has no rows")
    return dataset


def tokens(row: dict[str, Any]) -> np.ndarray:
    """A row's token ids (T + 1,)."""
    return row[COLUMN]
