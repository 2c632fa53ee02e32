"""Everything that outlives a step, as one value with one form on disk, whatever the layout."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.run import Run
from nlscale.data.loader import Loader
from nlscale.optim.build import Optimizer
from nlscale.optim.levels import identity
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World
from nlscale.train.pieces import Pieces, rectangles

NAMES = {"weight": "weights", "exp_avg": "moments.first", "exp_avg_sq": "moments.second"}


@dataclass
class TrainState:
    """Step and tokens so far, the levels (masters, moments, windows, counts) and the place in the data."""

    run: Run
    world: World
    leaves: list[Leaf]
    optimizer: Optimizer
    loader: Loader
    fingerprints: list[str]  # of the datasets
    step: int = 0
    tokens: int = 0
    wandb_id: str = ""

    def shards(self) -> dict[str, Pieces]:
        """Masters and moments of this rank, by global name."""
        found: dict[str, tuple[Leaf, dict[str, list]]] = {}
        for shard in self.optimizer.shards.values():
            for fragment in shard.fragments():
                leaf = fragment.leaf
                lists = found.setdefault(leaf.name, (leaf, {name: [] for name in fragment.values}))[1]
                for name, flat in fragment.values.items():
                    lists[name] += rectangles(flat, fragment.start, leaf.value.shape, self.base(leaf))
        return {
            f"{NAMES[name]}/{leaf.name}": Pieces(leaf.shape(self.world.tensor.size()), parts, self.owns(leaf))
            for leaf, lists in found.values()
            for name, parts in lists.items()
        }

    def base(self, leaf: Leaf) -> tuple[int, ...]:
        """Where this rank's part of a leaf begins in the whole."""
        shape = leaf.value.shape
        return tuple(self.world.tensor_rank * n if axis == leaf.shard else 0 for axis, n in enumerate(shape))

    def owns(self, leaf: Leaf) -> bool:
        """Whether this rank writes its part: a leaf that all tensor-parallel ranks hold is written by the first."""
        return leaf.shard is not None or self.world.tensor_rank == 0

    def whole(self, leaf: Leaf, values: Tensor, owner: bool) -> Pieces:
        """A tensor laid out like the leaf's local part."""
        return Pieces(leaf.shape(self.world.tensor.size()), [(self.base(leaf), values)], owner)

    def open_leaves(self) -> list[Leaf]:
        """Leaves whose window is open: their level has gathered gradients since it last moved."""
        windows = self.optimizer.windows
        return [leaf for name, shard in self.optimizer.shards.items() if windows.open[name] for leaf in shard.leaves]

    def windows_to_save(self) -> dict[str, Pieces]:
        """Open windows: each replica's own, or their total (`checkpoint.windows`). A collective in the latter case."""
        world, total = self.world, self.run.checkpoint.windows == "total"
        pieces = {}
        for leaf in self.open_leaves():
            values = self.optimizer.windows.of(leaf)
            part = world.tensor_rank if leaf.partial else 0
            owner = self.owns(leaf) or leaf.partial
            if total:
                values, part, owner = values.clone(), 0, self.owns(leaf) and world.replica == 0
                dist.all_reduce(values, group=world.data)
                if leaf.partial:
                    dist.all_reduce(values, group=world.tensor)
            replica = 0 if total else world.replica
            pieces[window_name(leaf.name, replica, part)] = self.whole(leaf, values, owner)
        return pieces

    def window_facts(self) -> dict[str, Any]:
        """How many windows are saved, and the tokens in each. A collective over replicas."""
        windows, world = self.optimizer.windows, self.world
        counts = [torch.zeros_like(windows.tokens) for _ in range(world.replicas)]
        dist.all_gather(counts, windows.tokens, group=world.data)
        partial = world.tensor.size() if self.run.parallel.sequence else 1
        if self.run.checkpoint.windows == "total":
            counts, partial = [torch.stack(counts).sum(0)], 1
        table = [dict(zip(windows.levels, count.tolist(), strict=True)) for count in counts]
        return {"replicas": len(table), "parts": partial, "tokens": table, "open": windows.open}

    def identity(self) -> dict[str, str]:
        """Every leaf of the model over all stages, with its level. A collective."""
        ranks = self.world.tensor.size()
        mine = {leaf.name: leaf.shape(ranks) for leaf in self.leaves}
        everyone: list[dict] = [{} for _ in range(self.world.size)]
        dist.all_gather_object(everyone, mine)
        return identity({k: v for each in everyone for k, v in each.items()}, self.run.levels)

    def facts(self) -> dict[str, Any]:
        """What is small enough for train_state.json. A collective."""
        parallel = self.run.parallel
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "updates": {name: int(shard.updates) for name, shard in self.optimizer.shards.items()},
            "windows": self.window_facts(),
            "layout": {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "replicas": self.world.replicas},
            "identity": self.identity(),
            "data": self.fingerprints,
            "wandb_id": self.wandb_id,
        }

    def apply_facts(self, facts: dict[str, Any]) -> None:
        """Takes over what train_state.json says."""
        self.step, self.tokens, self.wandb_id = facts["step"], facts["tokens"], facts["wandb_id"]
        self.loader.load_state_dict(facts["loader"])
        windows = self.optimizer.windows
        windows.open = {name: int(facts["windows"]["open"][name]) for name in windows.levels}
        mine = dealt(facts["windows"]["replicas"], self.world.replica, self.world.replicas)
        table = facts["windows"]["tokens"]
        windows.tokens.copy_(torch.tensor([sum(table[r][name] for r in mine) for name in windows.levels]))
        for name, shard in self.optimizer.shards.items():
            shard.updates = facts["updates"][name]


def window_name(leaf: str, replica: int, part: int) -> str:
    """Key of one replica's open window of a leaf; `part` tells partial sums over tensor-parallel ranks apart."""
    return f"windows/{replica}/{part}/{leaf}"


def dealt(stored: int, rank: int, ranks: int) -> range:
    """Which of `stored` parts fall to `rank` of `ranks`: sums may be dealt out freely, only their total counts."""
    return range(rank, stored, ranks)
