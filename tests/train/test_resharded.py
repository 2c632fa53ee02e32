"""Memories of a checkpoint on another layout: every rank gets what it would have learned itself, tensor by tensor."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nlscale.config.run import Run
from nlscale.data.card import check_data
from nlscale.runtime.folder import Folder
from nlscale.runtime.log import Journal
from nlscale.runtime.world import join
from nlscale.testing import ranks
from nlscale.train.loop import built, train
from nlscale.train.memories import named
from nlscale.train.restore import apply
from nlscale.train.state import TrainState
from tests.corpus import small_run

STEPS = 2
COMMON = ["model.reset=never", "data.shuffle=false", "model.layers=2", "optim.lr=1e-6", f"train.stop_at={STEPS}"]
COMMON += ["model.linear.chunk=8", "model.written.chunk=8", "model.titans.chunk=8", "model.self_modifying.chunk=8"]
QUICK = "levels=[{name: quick, period: 8, unit: token, width: 0.5}, {name: slow, period: 4, width: 0.5}]"
LAYOUTS = {
    "one": (1, []),
    "data": (2, []),
    "rows": (4, ["train.micro_batch=1"]),
    "tensor": (2, ["parallel.tensor=2"]),
    "context": (2, ["parallel.context=2"]),
    "tensor-context": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
}
MOVES = {  # mixer -> where it was saved, where it goes on
    "linear": ("context", "tensor"),
    "delta": ("data", "tensor-context"),
    "written": ("tensor", "context"),
    "titans": ("pipeline", "data"),
    "titans_mac": ("context", "rows"),
    "titans_mag": ("tensor", "pipeline"),
    "titans_mal": ("data", "tensor"),
    "self_modifying": ("tensor-context", "data"),
    "attention": ("context", "tensor"),
}
Held = dict[str, Tensor]


def memories(state: TrainState) -> Held:
    """Copies of what this rank holds, by micro-batch and name."""
    found: Held = {}
    for carried in state.carried:
        for place, held in enumerate(carried.open()):
            found |= {f"{place}/{name}": part.clone() for name, part, *_ in named(carried, held)}
    return found


def taken_over(run: Run, folders: list[Path]) -> list[Held]:
    """What this rank's memories are at a run's beginning, and after it took over each folder's checkpoint."""
    world = join(run.parallel, run.cluster, run.train.seed)
    state, _ = built(run, world, check_data(run.data, False))
    found = [memories(state)]
    for folder in folders:
        apply(state, Folder(folder).checkpoint(STEPS), Journal(Folder(folder), False))
        found.append(memories(state))
    return found


@pytest.mark.parametrize("mixer", MOVES)
def test_a_rank_gets_what_it_would_have_learned(mixer: str, prepared: str, tmp_path: Path) -> None:
    said = [*COMMON, f"model.mixer={mixer}", *([QUICK] if mixer in ("attention", "self_modifying") else [])]
    for place in MOVES[mixer]:
        count, layout = LAYOUTS[place]
        run = small_run(prepared, tmp_path / place, *said, *layout)
        ranks(count, train, run)
    for rank, (begin, theirs, own) in enumerate(ranks(count, taken_over, run, [tmp_path / at for at in MOVES[mixer]])):
        assert begin.keys() == theirs.keys() == own.keys() and own
        learned = [name for name in own if not torch.equal(own[name], begin[name])]
        assert len(learned) > 0.8 * len(own), f"rank {rank}: what is carried is what a row begins with"
        for name in learned:
            assert (theirs[name] - own[name]).norm() <= 1e-3 * (own[name] - begin[name]).norm(), f"rank {rank}: {name}"
