"""Rows for a replica, through mosaicml-streaming; no shard is read from before it matched its digest."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from nlscale.config.data import Data
from nlscale.config.errors import UserError, require
from nlscale.data.card import load_card
from nlscale.data.mds import COLUMN, LOCAL, Stream, StreamingDataset
from nlscale.data.shared import one_name
from nlscale.data.verify import audit, fingerprint_faults
from nlscale.runtime.alone import alone_on_node
from nlscale.runtime.world import World

VOID = -1  # the tokens of a row that could not be trusted: they are no targets, and no part of the hash
Found = Callable[[str], None]


def open_rows(data: Data, split: str, world: World, rows: int, shuffle: bool, found: Found = print) -> "Audited":
    """The rows of a split for this rank's replica, `rows` a step. A collective over all ranks.

    The ranks of one replica are neighbours and read the same rows. The order of the global batches depends on
    `data.canonical_nodes`, `shuffle_block` and `shuffle_seed` alone. `found` is told of shards put into quarantine.
    """
    for source in data.sources:
        for fault in fingerprint_faults(source.path, load_card(source.path)):
            raise UserError(f"{source.path} is damaged: {fault}; `nlscale data verify {source.path}` says all")
    streams = [
        Stream(local=source.path, split=split, proportion=source.weight if len(data.sources) > 1 else None)
        for source in data.sources
    ]
    replication = world.size // world.replicas
    with alone_on_node(world.local_rank), one_name(world):  # streaming looks for a free name, then takes it
        dataset = Audited(
            data.damaged,
            found,
            data.sequence + 1,
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


class Audited(StreamingDataset):
    """A dataset whose process reads each shard whole, once, before its first row: then the disk's cache has it, too."""

    def __init__(self, damaged: Literal["stop", "quarantine"], found: Found, length: int, **options: Any) -> None:
        """`length`: tokens of a row. `found`: told of every shard put into quarantine."""
        super().__init__(**options)
        self.damaged, self.found, self.length = damaged, found, length
        self.sound: dict[int, bool] = {}
        for shard in range(
            len(self.shards)
        ):  # what is gone is found here, where it is named, not by streaming's threads
            self._shard_states[shard] = LOCAL

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Nothing: shards are local, or they are damaged."""

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """A row; of a damaged shard: UserError naming shard and sample, or a void row under quarantine."""
        shard, sample = self.spanner[sample_id]
        if shard not in self.sound:
            self.sound[shard] = self.is_sound(self.shards[shard], sample)
        if self.sound[shard]:
            return super().get_item(sample_id, retry)
        return {COLUMN: np.full(self.length, VOID, np.int64)}

    def is_sound(self, shard: Any, sample: int) -> bool:
        """Audits a shard of which `sample` is asked for."""
        facts = vars(shard.raw_data)
        faults = list(audit(shard.dirname, shard.split, {"raw_data": facts}, load_card(shard.dirname)))
        if not faults:
            return True
        where = f"{shard.dirname}/{shard.split}/{facts['basename']}"
        if self.damaged == "stop":
            raise UserError(
                f"{where}: {faults[0]} (sample {sample} was asked for); restore the file, or data.damaged=quarantine "
                f"goes on without its {shard.samples} rows"
            )
        self.found(f"{where}: {faults[0]}; its {shard.samples} rows are left out")
        return False
