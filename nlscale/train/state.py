"""Everything that outlives a step, as one value with one form on disk, whatever the layout."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from nlscale.config.mixers import network_of
from nlscale.config.run import Run
from nlscale.data.card import Card
from nlscale.data.loader import Loader
from nlscale.optim.build import Optimizer
from nlscale.optim.levels import identity
from nlscale.optim.reduce import Open
from nlscale.parallel.carried import Carried
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World
from nlscale.train.pieces import Pieces, rectangles
from nlscale.train.windows import dealt, window_facts

NAMES = {"weight": "weights", "exp_avg": "moments.first", "exp_avg_sq": "moments.second"}


@dataclass
class TrainState:
    """Step and tokens so far, the levels (masters, moments, windows, counts) and the place in the data."""

    run: Run
    world: World
    leaves: list[Leaf]
    optimizer: Optimizer
    loader: Loader
    cards: Sequence[Card]  # of the datasets
    carried: list[Carried] = field(default_factory=list)  # memories that go on from row to row, a chunk of the model
    replay: Loader | None = None  # of rows that levels replay ...
    replay_fingerprint: str = ""  # ... and of which dataset
    step: int = 0
    tokens: int = 0
    wandb_id: str = ""
    losses: list[float] = field(default_factory=list)  # of the last steps, which a spike stands out of

    @property
    def fingerprints(self) -> list[str]:
        """Of the datasets."""
        return [card.fingerprint for card in self.cards]

    def datasets(self) -> list[dict[str, Any]]:
        """What the datasets are, as a person tells them apart."""
        return datasets(self.run, self.cards)

    def shards(self) -> dict[str, Pieces]:
        """Masters and moments of this rank, by global name."""
        found: dict[str, tuple[Leaf, list]] = {}
        for mover in self.optimizer.movers.values():
            for fragment in (each for shard in mover.shards for each in self.optimizer.fragments(shard)):
                leaf = fragment.leaf
                for name, flat in fragment.values.items():
                    key = f"{NAMES.get(name, f'state.{name}')}/{leaf.name}"
                    parts = found.setdefault(key, (leaf, []))[1]
                    parts += rectangles(flat, fragment.start, leaf.value.shape, leaf.base(self.world.tensor_rank))
        ranks = self.world.tensor.size()
        return {key: Pieces(leaf.shape(ranks), parts, self.owns(leaf)) for key, (leaf, parts) in found.items()}

    def owns(self, leaf: Leaf) -> bool:
        """Whether this rank writes its part: what several ranks hold is written by the first of them."""
        return not leaf.twin and (leaf.shard is not None or self.world.tensor_rank == 0)

    def open_sums(self) -> list[Open]:
        """What groups have gathered since they last moved: gradients, and inputs where a rule asks for them."""
        opened, movers = self.optimizer.windows.open, self.optimizer.movers.items()
        waiting = [mover for name, mover in movers if opened[name] and not mover.group.level.frozen]
        return [each for mover in waiting for each in mover.open_sums()]

    def identity(self) -> dict[str, str]:
        """Every leaf of the model over all stages, with its level. A collective."""
        ranks = self.world.tensor.size()
        shapes = merged({leaf.name: leaf.shape(ranks) for leaf in self.leaves}, self.world.pipeline)
        return identity(shapes, self.run)

    def facts(self) -> dict[str, Any]:
        """What is small enough for train_state.json. A collective."""
        parallel = self.run.parallel
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "replay": {"data": self.replay_fingerprint, "loader": self.replay.state_dict()} if self.replay else None,
            "updates": merged(self.optimizer.updates(), self.world.pipeline),
            "windows": window_facts(self),
            "tasks": merged(self.optimizer.tasks.facts(), self.world.pipeline),
            "layout": {
                "tensor": parallel.tensor,
                "pipeline": parallel.pipeline,
                "context": parallel.context,
                "replicas": self.world.replicas,
            },
            "identity": self.identity(),
            "network": network_of(self.run.model),
            "data": self.fingerprints,
            "datasets": self.datasets(),
            "wandb_id": self.wandb_id,
            "losses": self.losses,
        }

    def apply_facts(self, facts: dict[str, Any]) -> None:
        """Takes over what train_state.json says."""
        self.step, self.tokens, self.wandb_id = facts["step"], facts["tokens"], facts["wandb_id"]
        self.losses = list(facts.get("losses", []))
        if facts["loader"] is not None:
            self.loader.load_state_dict(facts["loader"])
        replay = facts.get("replay")
        if self.replay is not None and replay and replay["data"] == self.replay_fingerprint:
            self.replay.load_state_dict(replay["loader"])
        self.optimizer.tasks.apply_facts(facts.get("tasks", {}))
        windows, table = self.optimizer.windows, facts["windows"]["tokens"]
        windows.open = {name: int(facts["windows"]["open"].get(name, 0)) for name in windows.groups}
        mine = dealt(len(table), self.world.copy, self.world.copies)
        windows.tokens.copy_(
            torch.tensor([sum(table[r].get(name, 0) for r in mine) for name in windows.groups], dtype=torch.float64)
        )
        self.optimizer.set_updates(facts["updates"])


def datasets(run: Run, cards: Sequence[Card]) -> list[dict[str, Any]]:
    """What a run's datasets are, as a person tells them apart."""
    return [{"path": source.path, **asdict(card)} for source, card in zip(run.data.sources, cards, strict=True)]


def beginning(run: Run, cards: Sequence[Card]) -> dict[str, Any]:
    """The facts of a state that no step has changed, but for its leaves' identity."""
    return {
        "step": 0,
        "tokens": 0,
        "loader": None,
        "replay": None,
        "updates": {},
        "windows": {"tokens": [], "open": {}},
        "tasks": {},
        "layout": {"tensor": 1, "pipeline": 1, "context": 1, "replicas": 1},
        "network": network_of(run.model),
        "data": [card.fingerprint for card in cards],
        "datasets": datasets(run, cards),
        "wandb_id": "",
        "losses": [],
    }


def merged(mine: dict[str, Any], stages: dist.ProcessGroup) -> dict[str, Any]:
    """The dictionaries of all pipeline stages as one. A collective over them."""
    everyone: list[dict[str, Any]] = [{} for _ in range(stages.size())]
    dist.all_gather_object(everyone, mine, group=stages)
    return {key: value for each in everyone for key, value in each.items()}
