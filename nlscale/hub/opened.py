"""A run's network as a checkpoint left it, to read with: on one process, or split over tensor-parallel ranks."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from nlscale_kernels.switch import kernels
from torch import Tensor

from nlscale.config.errors import UserError, require
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.data.card import load_card
from nlscale.data.tokenise import Tokeniser, of_dataset
from nlscale.model.hope import Hope
from nlscale.parallel.apply import Parallelized, parallelize
from nlscale.runtime.folder import STATE, Folder
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World, join, leave
from nlscale.train.manifest import verify
from nlscale.train.pieces import Pieces, load, stored

CONFIG = "config.yaml"
HERE = (  # what training did otherwise
    *("parallel.tensor=1", "parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.context=1"),
    *("parallel.sequence=false", "train.compile=none", "train.recompute=none", "model.inner.meta=first_order"),
    *("optim.second_order=false", "cluster.nproc=null", "model.reset=row"),
)


@dataclass(frozen=True)
class Source:
    """A checkpoint that is to be read with, and how; settled before there is a world."""

    path: Path
    step: int
    run: Run
    overrides: tuple[str, ...]  # of the run
    tokeniser: Tokeniser

    def long(self, tokens: int) -> Run:
        """The run, for rows that become so many tokens long."""
        rows = -(-tokens // self.run.data.sequence)  # a multiple of what it was trained on fits whatever that fitted
        return read(str(self.path / CONFIG), [*HERE, *self.overrides, f"data.sequence={rows * self.run.data.sequence}"])


def source(folder: Folder, step: int | None, overrides: Sequence[str] = ()) -> Source:
    """The checkpoint of a step, None: the newest. Raises UserError where it cannot be read with."""
    steps = folder.steps()
    require(bool(steps), f"{folder.path} has no checkpoint")
    step = steps[0] if step is None else step
    require(step in steps, f"{folder.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    path = folder.checkpoint(step)
    run = read(str(path / CONFIG), [*HERE, *overrides])
    parallel = run.parallel
    require(
        parallel.ranks == parallel.tensor,
        f"a run is read by tensor-parallel ranks; parallel.tensor={parallel.ranks} would work",
    )
    dataset = run.data.sources[0].path
    card, facts = load_card(dataset), json.loads((path / STATE).read_text())
    then = facts["datasets"][0]["tokeniser_digest"]
    require(
        card.tokeniser_digest == then,
        f"{dataset} has tokeniser {card.tokeniser} ({card.tokeniser_digest[:8]}); the checkpoint was trained with another "
        f"({then[:8]}); give data.path of a dataset that was made with it",
    )
    return Source(path, step, run, tuple(overrides), of_dataset(dataset))


@contextmanager
def opened(run: Run, path: Path) -> Iterator[tuple[Hope, World]]:
    """The network with the checkpoint's weights, on this rank, and the world it is split over. A collective.

    Raises UserError for a damaged checkpoint, or one of another model.
    """
    with kernels(run.train.kernels):
        world = join(run.parallel, run.cluster, run.train.seed)
        try:
            faults = verify(path, world.rank, world.size)
            require(not faults, f"{path} is damaged: {'; '.join(faults[:3])}")
            model = parallelize(run, world)
            take(model, path, world)
            model.pace(run.model.inner.pace(json.loads((path / STATE).read_text())["step"], run.train.steps))
            yield model.chunks[0], world
        finally:
            leave()


def take(model: Parallelized, path: Path, world: World) -> None:
    """Fills the model's leaves with a checkpoint's weights. A collective."""
    there, ranks = stored(path), world.tensor.size()
    found: dict[str, tuple[Leaf, Tensor]] = {}
    for leaf in model.leaves:
        name = f"weights/{leaf.name}"
        shape, saved = leaf.shape(ranks), there.get(name)
        if saved is None or saved.shape != shape:
            raise UserError(
                f"{path} holds {saved and saved.shape or 'nothing'} for {leaf.name}, and this model wants {shape}: "
                "overrides may change how a run is read, not its shape"
            )
        found[name] = leaf, torch.empty(leaf.value.shape, dtype=saved.dtype)
    load(
        {
            name: Pieces(leaf.shape(ranks), [(leaf.base(world.tensor_rank), values)], False)
            for name, (leaf, values) in found.items()
        },
        path,
    )
    for leaf, values in found.values():
        leaf.value.copy_(values)
