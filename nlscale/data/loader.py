"""Rows for one step after another, over epochs, from wherever a checkpoint left off."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from nlscale.config.data import Data
from nlscale.config.errors import require
from nlscale.data.mds import StreamingDataset, tokens
from nlscale.data.rows import Found, open_rows
from nlscale.runtime.watch import sparing_children
from nlscale.runtime.world import World


class Loader:
    """An endless iterator of (rows of this replica, T + 1) arrays.

    Its whole state is the number of steps taken: an epoch has floor(rows / global batch) steps at every layout.
    """

    def __init__(
        self,
        data: Data,
        global_batch: int,
        world: World,
        follow: bool = False,
        name: str = "train.global_batch",
        found: Found = print,
    ) -> None:
        """`follow`: row i of a step follows row i of the step before in the corpus (`model.reset: never`).

        `name`: the setting that `global_batch` comes from. `found` is told of shards put into quarantine.
        """
        rows = global_batch // world.replicas
        self.dataset = open_rows(data, "train", world, rows, data.shuffle, found)
        self.rows_a_step = global_batch
        self.order: dict[str, Any] = {
            name: global_batch,
            "model.reset": "never" if follow else "row",
            "data.shuffle": data.shuffle,
            "data.shuffle_seed": data.shuffle_seed,
            "data.shuffle_block": data.shuffle_block,
            "data.canonical_nodes": data.canonical_nodes,
            "weights": [source.weight for source in data.sources],
        }
        available = self.dataset.epoch_size
        self.steps_an_epoch = available // global_batch
        require(
            self.steps_an_epoch > 0,
            f"the training split has {available} rows, fewer than {name}={global_batch}; "
            f"more data is needed, or a {name} of at most {available}",
        )
        self.step, self.follow = 0, follow
        options: dict[str, Any] = {"num_workers": data.workers, "collate_fn": collate}
        options["persistent_workers"] = data.workers > 0
        if follow:
            mine = range(world.replica * rows, (world.replica + 1) * rows)
            self.batches = DataLoader(Rows(self.dataset), batch_sampler=self._followed(mine), **options)
        else:
            self.batches = DataLoader(self.dataset, batch_size=rows, drop_last=True, **options)
        self.iterator = self._follow() if follow else self._run()

    def __next__(self) -> np.ndarray:
        return next(self.iterator)

    def _run(self) -> Iterator[np.ndarray]:
        while True:
            for batch in self._begun():
                self.step += 1
                yield batch
                if self.step % self.steps_an_epoch == 0:
                    break

    def _follow(self) -> Iterator[np.ndarray]:
        for batch in self._begun():
            self.step += 1
            yield batch

    def _begun(self) -> Iterator[np.ndarray]:
        """The batches, with workers that a signal to the whole job does not end: the rank ends them when it has saved."""
        with sparing_children():
            return iter(self.batches)

    def _followed(self, streams: range) -> Iterator[list[int]]:
        """Row numbers of the next steps: stream i begins i epochs of one row a step into the corpus, and goes round it.

        In an epoch every row is read once, by one of the streams.
        """
        whole = self.steps_an_epoch * self.rows_a_step
        for step in itertools.count(self.step):
            yield [(stream * self.steps_an_epoch + step) % whole for stream in streams]

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, and what decides which rows those were."""
        return {"step": self.step, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after `state["step"]` steps, at this or another layout. Call before the first batch is taken.

        Raises UserError where the order of the rows has changed: steps would then name other rows.
        """
        for name, then in {"model.reset": "row", **state["order"]}.items():
            require(
                self.order[name] == then,
                f"{name}={self.order[name]}, but the checkpoint's rows were taken with {then}: rows would be skipped or "
                f"repeated; {name}={then} would work, or another run.name",
            )
        self.step = int(state["step"])
        if self.follow:
            return
        epoch, steps = divmod(self.step, self.steps_an_epoch)
        self.dataset.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": steps * self.rows_a_step,
                "num_canonical_nodes": self.order["data.canonical_nodes"],
                "shuffle_seed": self.order["data.shuffle_seed"],
                "initial_physical_nodes": None,
            }
        )


class Rows(Dataset):
    """A dataset's rows by their numbers."""

    def __init__(self, dataset: StreamingDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row."""
        return self.dataset[index]


def collate(rows: list[dict[str, Any]]) -> np.ndarray:
    """Rows -> one array (B, T + 1)."""
    return np.stack([tokens(row) for row in rows])


class HeldOut:
    """Held-out rows, spread over the split and so over all streams of a mixture, dealt to replicas.

    They are the same at every layout: a replica that lacks rows for its last micro-batch repeats one that does not count.
    """

    def __init__(self, data: Data, rows: int, multiple: int, world: World, found: Found = print) -> None:
        """`multiple`: rows of this replica come in multiples of it. `found`: as the Loader's."""
        self.dataset = open_rows(data, "heldout", world, multiple, False, found)
        available = self.dataset.num_samples
        total = min(rows, available)
        mine = [i * available // total for i in range(world.replica, total, world.replicas)]
        each = -(-total // (world.replicas * multiple)) * multiple
        self.counted, self.indices = len(mine), mine + [0] * (each - len(mine))

    def rows(self) -> tuple[np.ndarray, int]:
        """Rows of this replica (B, T + 1), and how many of them count."""
        return collate([self.dataset[index] for index in self.indices]), self.counted
