"""A run's network as a checkpoint left it, to read with: on one process, or split over tensor-parallel ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nlscale_kernels.switch import kernels
from torch import Tensor

from nlscale.config.errors import UserError, require
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.data.card import check_data
from nlscale.data.tokenise import Tokeniser, kept
from nlscale.model.hope import Hope
from nlscale.parallel.apply import Parallelized, parallelize
from nlscale.runtime.folder import CONFIG, STATE, Folder, read_json
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World, join, leave
from nlscale.train.agree import everywhere
from nlscale.train.manifest import verify
from nlscale.train.pieces import Pieces, load, stored

HERE = {  # what training may have done otherwise
    **dict.fromkeys(("parallel.pipeline", "parallel.virtual_pipeline", "parallel.context"), "1"),
    **dict.fromkeys(("parallel.sequence", "optim.second_order"), "false"),
    **dict.fromkeys(("train.compile", "train.recompute"), "none"),
    **{"model.inner.meta": "first_order", "model.reset": "row", "cluster.nproc": "null"},
}


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
        return as_read(self.path, [*self.overrides, f"data.sequence={rows * self.run.data.sequence}"])

    def check_rows(self, longer: int = 1) -> None:
        """Raises UserError where the run's rows are not there, or were made with another tokeniser; or where held-out rows
        are fewer than the `longer` that are to be read as one.
        """
        cards = check_data(self.run.data, False)
        dataset, card, held_out = self.run.data.sources[0].path, cards[0], sum(each.rows["heldout"] for each in cards)
        require(
            longer <= max(1, held_out),
            f"--longer {longer}: there are {held_out} held-out rows; a smaller --longer would work",
        )
        require(
            card.tokeniser_digest == self.tokeniser.digest,
            f"{dataset} has tokeniser {card.tokeniser} ({card.tokeniser_digest[:8]}); the checkpoint was trained with "
            f"another ({self.tokeniser.digest[:8]}); give data.path of a dataset that was made with it",
        )


def source(folder: Folder, step: int | None, overrides: Sequence[str] = ()) -> Source:
    """The checkpoint of a step, None: the newest. Raises UserError where it cannot be read with."""
    step = folder.chosen(step)
    path = folder.checkpoint(step)
    for key, value in HERE.items():
        said = [each for each in overrides if each.removeprefix("--").split("=")[0] == key]
        require(
            not said or said[-1].endswith(f"={value}"),
            f"{said and said[-1]} is of training: a run is read with {key}={value}, and split by parallel.tensor alone",
        )
    run = as_read(path, overrides)
    then = facts_of(path)["datasets"][0]
    return Source(path, step, run, tuple(overrides), kept(path, then["tokeniser"], then["tokeniser_digest"]))


def as_read(path: Path, overrides: Sequence[str]) -> Run:
    """The run of a checkpoint, laid out for reading."""
    here = [f"{key}={value}" for key, value in HERE.items()]
    return read(str(path / CONFIG), ["parallel.tensor=1", *overrides, *here])


def facts_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; raises UserError where it cannot be read."""
    facts = read_json(path / STATE)
    require("step" in facts and bool(facts.get("datasets")), f"{path} is damaged: {STATE} says nothing of its run")
    return facts


@contextmanager
def opened(run: Run, path: Path) -> Iterator[tuple[Hope, World]]:
    """The network with the checkpoint's weights, on this rank, and the world it is split over. A collective.

    Raises UserError for a damaged checkpoint, or one of another model, on every rank.
    """
    with kernels(run.train.kernels):
        world = join(run.parallel, run.cluster, run.train.seed)
        try:
            require(
                world.size == run.parallel.tensor,
                f"{world.size} ranks were started, and parallel.tensor={run.parallel.tensor}",
            )
            faults = [fault for each in everywhere(lambda: verify(path, world.rank, world.size)) for fault in each]
            require(not faults, f"{path} is damaged: {'; '.join(faults[:3])}")
            model = parallelize(run, world)
            take(model, path, world)
            model.pace(run.model.inner.pace(facts_of(path)["step"], run.train.steps))
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
