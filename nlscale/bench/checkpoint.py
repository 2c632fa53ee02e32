"""What saves cost a run, and how fast a checkpoint is checked and taken over: one rank, a state of some hundred MiB."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from nlscale.bench.table import Row, at_least, at_most, by_clock, show
from nlscale.config.read import read
from nlscale.data.batch import to_batch
from nlscale.data.card import check_data
from nlscale.data.write import Preparation, prepare
from nlscale.parallel.apply import Parallelized
from nlscale.runtime.folder import Folder
from nlscale.runtime.holder import Hold
from nlscale.runtime.log import Journal
from nlscale.runtime.world import join
from nlscale.train.checkpoint import Checkpoints
from nlscale.train.loop import built
from nlscale.train.state import TrainState

ROUNDS = 7
SIZES = ["model.layers=4", "model.width=768", "model.hidden=2048", "model.heads=12", "model.kv_heads=12"]


def stepped(state: TrainState, model: Parallelized, document: int) -> float:
    """Seconds of one step, from its rows on."""
    batch = to_batch(next(state.loader), document, torch.device("cpu"))
    began = perf_counter()
    total = model.forward_backward(batch.micro(state.run.train.micro_batch), True)
    state.step += 1
    state.optimizer.step(state.step, total[2])
    return perf_counter() - began


def main(target: str | None) -> int:
    """Prints the table; 0 if every target is kept."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as scratch:
        place = Path(scratch)
        prepare(Preparation(sources=("stdlib",), out=str(place / "data"), sequence=256, tokeniser="bytes"))
        run = read("demo", ["parallel.tensor=1", f"data.path={place / 'data'}", *SIZES, f"run.folder={place / 'run'}"])
        run = replace(run, model=replace(run.model, vocabulary=384))
        folder = Folder(place / "run")
        folder.open()
        (card,) = check_data(run.data, False)
        world = join(run.parallel, run.cluster, run.train.seed)
        state, model = built(run, world, [card])
        hold = Hold(folder.path, run.cluster.lease)
        hold.take()
        checkpoints = Checkpoints(run, world, folder, Journal(folder, False), hold)
        steps = [stepped(state, model, card.document) for _ in range(9)]
        rows = saves(state, model, checkpoints, card.document, median(steps[1:]))
        rows += takeover(state, checkpoints, place)
        size = sum(path.stat().st_size for path in folder.checkpoint(state.step).iterdir()) / 2**20
        return show(f"checkpoints of {size:,.0f} MiB, one rank; the interval of the demo", rows, target)


def saves(state: TrainState, model: Parallelized, checkpoints: Checkpoints, document: int, step: float) -> list[Row]:
    """Stalls of both ways, in turn, after a step each."""
    waited, stalls, steps, beside = [], [], [], []
    for turn in range(ROUNDS):
        stepped(state, model, document)
        waited.append(by_clock(lambda: checkpoints.save(state, wait=True)))
        stepped(state, model, document)
        stall = by_clock(lambda: checkpoints.save(state, wait=False))
        slowed = stepped(state, model, document)  # with the writer beside it
        checkpoints.beside.settle()
        if turn:  # the first touches new pages
            stalls.append(stall)
            beside.append(slowed)
            steps.append(stepped(state, model, document))
    interval = state.run.checkpoint.interval
    usual = median(steps)
    lost = median(stalls) + max(0.0, median(beside) - usual)
    return [
        at_most("stall of a save beside / of one that is waited for", median(stalls), "s", median(waited), 0.05),
        at_most(f"stall / {interval} steps", median(stalls), "s", interval * usual, 0.01),
        at_most(f"stall and slower step beside it / {interval} steps", lost, "s", interval * usual, 0.01),
    ]


def takeover(state: TrainState, checkpoints: Checkpoints, place: Path) -> list[Row]:
    """Checking and loading against a plain copy of the files; all from the disk's cache."""
    stepped_at = checkpoints.folder.steps()[0]
    path = checkpoints.folder.checkpoint(stepped_at)
    size = sum(file.stat().st_size for file in path.iterdir()) / 2**20

    def copied() -> None:
        shutil.copytree(path, place / "copy")

    def taken() -> None:
        state.step = -1
        assert checkpoints.restore(state)

    def timed(action: Callable[[], None]) -> float:
        shutil.rmtree(place / "copy", ignore_errors=True)
        return by_clock(action)

    pairs = [(timed(copied), timed(taken)) for _ in range(ROUNDS)]
    plain, ours = (median(each) for each in zip(*pairs, strict=True))
    return [at_least("verify and load / plain copy", size / ours, "MiB/s", size / plain, 0.5)]
