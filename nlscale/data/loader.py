"""Rows for one step after another, over epochs, from wherever a checkpoint left off."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from nlscale.config.data import Data
from nlscale.config.errors import require
from nlscale.data.mds import open_rows, tokens
from nlscale.runtime.world import World


class Loader:
    """An endless iterator of (rows of this replica, T + 1) arrays.

    Its whole state is the number of steps taken: an epoch has floor(rows / global batch) steps at every layout.
    """

    def __init__(self, data: Data, global_batch: int, world: World) -> None:
        rows = global_batch // world.replicas
        self.dataset = open_rows(data, "train", world, rows, data.shuffle)
        self.global_batch, self.canonical_nodes, self.seed = global_batch, data.canonical_nodes, data.shuffle_seed
        available = self.dataset.epoch_size
        self.steps_an_epoch = available // global_batch
        require(
            self.steps_an_epoch > 0,
            f"the training split has {available} rows, fewer than train.global_batch={global_batch}; "
            f"train.global_batch={available} or more data would work",
        )
        self.batches = DataLoader(
            self.dataset,
            batch_size=rows,
            num_workers=data.workers,
            collate_fn=collate,
            drop_last=True,
            persistent_workers=data.workers > 0,
        )
        self.step = 0
        self.iterator = self._run()

    def __next__(self) -> np.ndarray:
        return next(self.iterator)

    def _run(self) -> Iterator[np.ndarray]:
        while True:
            for batch in self.batches:
                self.step += 1
                yield batch
                if self.step % self.steps_an_epoch == 0:
                    break

    def state_dict(self) -> dict[str, Any]:
        """Steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after `state["step"]` steps, at this or another layout. Call before the first batch is taken."""
        self.step = int(state["step"])
        epoch, steps = divmod(self.step, self.steps_an_epoch)
        self.dataset.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": steps * self.global_batch,
                "num_canonical_nodes": self.canonical_nodes,
                "shuffle_seed": self.seed,
                "initial_physical_nodes": None,
            }
        )


def collate(rows: list[dict[str, Any]]) -> np.ndarray:
    """Rows -> one array (B, T + 1)."""
    return np.stack([tokens(row) for row in rows])


class HeldOut:
    """The first rows of the held-out split, dealt to replicas; the same ones at every evaluation and layout."""

    def __init__(self, data: Data, rows: int, micro_batch: int, world: World) -> None:
        self.dataset = open_rows(data, "heldout", world, micro_batch, shuffle=False)
        each = min(rows, self.dataset.num_samples) // (world.replicas * micro_batch) * micro_batch
        require(
            each > 0,
            f"the held-out split has {self.dataset.num_samples} rows and train.evaluate_rows={rows}: too few for "
            f"{world.replicas} replicas x train.micro_batch={micro_batch}; train.evaluate_rows=0 evaluates nothing",
        )
        self.indices = range(world.replica, each * world.replicas, world.replicas)

    def rows(self) -> np.ndarray:
        """All held-out rows of this replica (B, T + 1)."""
        return collate([self.dataset[index] for index in self.indices])
