"""One step: rows -> loss -> windows -> the levels that are due -> one small reduction of what to report."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.errors import require
from nlscale.data.batch import HASH_BITS, to_batch, token_hash
from nlscale.optim.mover import Moved
from nlscale.parallel.apply import MicroBatch, Parallelized
from nlscale.runtime.clock import parted
from nlscale.train.state import TrainState

PART = 2**32  # of a hash: its sums over millions of ranks stay exact in float64


@dataclass(frozen=True)
class Report:
    """What one step did, equal on all ranks but for `own`."""

    loss: float  # mean over all targets of the step whose micro-batch's loss was finite; NaN where none was
    tokens: int
    token_hash: int
    stop: bool  # a rank was asked to stop
    seconds: float
    data_wait: float
    own: float = 0.0  # seconds of this rank's rows, forward and backward; the one figure that differs between ranks
    grad_norm: dict[str, float] = field(default_factory=dict)  # of the levels that moved
    update_norm: dict[str, float] = field(default_factory=dict)
    refused: int = 0  # micro-batches whose loss was not finite: they added nothing to any window
    replay_loss: float | None = None  # mean over the replayed targets
    skipped: tuple[str, ...] = ()  # levels that were due, but whose window was not finite or held no target
    parts: dict[str, float] = field(default_factory=dict)  # seconds of this rank, by what they went into
    groups: tuple[str, ...] = ()  # that were due: levels, or their phases


BeforeMove = Callable[[int, Sequence[MicroBatch]], None]


def nothing(step: int, batches: Sequence[MicroBatch]) -> None:
    """What usually happens between backward and the levels' move."""


def train_step(
    state: TrainState, model: Parallelized, document: int, stop: Callable[[], bool], before_move: BeforeMove = nothing
) -> Report:
    """Takes the next rows and makes one step of all levels that are due; `before_move` sees the micro-batches.

    `stop` is asked at the end, so that what this rank hears during a step is heeded with it.
    """
    run, world, began = state.run, state.world, time.monotonic()
    for clock in (model.clock, state.optimizer.clock):
        clock.restart()
    rows = next(state.loader)
    waited = time.monotonic() - began
    if run.data.damaged == "quarantine" and (passed := passed_over(state, rows, stop, waited)) is not None:
        return passed
    batch = to_batch(rows, document, world.device)
    micro_batches = batch.micro(run.train.micro_batch)
    model.pace(run.model.inner.pace(state.step + 1, run.train.steps))
    total = model.forward_backward(micro_batches, True)
    own = time.monotonic() - began
    again = replayed(state, model, document)
    state.step += 1
    before_move(state.step, micro_batches)
    moved = state.optimizer.step(state.step, total[2], None if again is None else again[2])
    if state.step == run.train.steps:
        moved |= state.optimizer.flush(state.step)
    targets = (batch.targets_BT >= 0).sum()
    report = reduced(state, total, token_hash(rows), targets, moved, stop, again)
    state.tokens += int(report[2])
    went = {name: move for name, move in moved.items() if not move.skipped}
    squares = dict(zip(moved, report[10:], strict=True))
    require(
        report[9] == report[8] * (world.size // world.replicas),
        f"step {state.step}: ranks of one replica read different rows: their hosts' copies of the dataset are not the same; "
        "`nlscale data verify` on each says which is damaged",
    )
    level = {group.name: group.level.name for group in state.optimizer.groups}
    return Report(
        loss=report[0] / report[1] if report[1] else math.nan,
        tokens=int(report[2]),
        token_hash=int(report[3]) % 2**HASH_BITS,
        stop=report[4] > 0,
        seconds=time.monotonic() - began,
        data_wait=waited,
        own=own,
        parts=parted(model.clock.seconds() | state.optimizer.clock.seconds()),
        refused=int(report[5]),
        replay_loss=report[6] / report[7] if report[7] else None,
        grad_norm=joint({name: move.grad_norm**2 for name, move in went.items()}, level),
        update_norm=joint({name: squares[name] for name in went}, level),
        skipped=tuple(sorted({level[name] for name in moved.keys() - went.keys()})),
        groups=tuple(moved),
    )


def passed_over(state: TrainState, rows: np.ndarray, stop: Callable[[], bool], waited: float) -> Report | None:
    """The report of a step all of whose rows, on all replicas, are void: nothing moves. None for any other. A collective."""
    world = state.world
    found = torch.tensor([float((rows[:, 0] >= 0).any()), float(stop())], dtype=torch.float64, device=world.device)
    dist.all_reduce(found)
    if found[0] > 0:
        return None
    state.step += 1
    if state.step == state.run.train.steps:
        state.optimizer.flush(state.step)
    return Report(math.nan, 0, 0, bool(found[1] > 0), waited, waited)


def replayed(state: TrainState, model: Parallelized, document: int) -> Tensor | None:
    """What `forward_backward` says of the step's replayed rows; None where nothing is replayed."""
    if state.replay is None or model.replayed is None:
        return None
    batch = to_batch(next(state.replay), document, state.world.device)
    return model.replayed(batch.micro(state.run.train.micro_batch))


def joint(squares: dict[str, float], level: dict[str, str]) -> dict[str, float]:
    """Norms by level: the groups of a level together."""
    sums: dict[str, float] = {}
    for name, square in squares.items():
        sums[level[name]] = sums.get(level[name], 0.0) + square
    return {name: total**0.5 for name, total in sums.items()}


def reduced(
    state: TrainState,
    total: Tensor,
    rows_hash: int,
    targets: Tensor,
    moved: dict[str, Moved],
    stop: Callable[[], bool],
    again: Tensor | None,
) -> list[float]:
    """Sums over all ranks, in one collective: loss, its targets, all targets, hash, stop, refused micro-batches, loss
    and targets of replayed rows, part of the hash by the ranks that speak for their rows and by all, and the squared
    update of each moved group.
    """
    world = state.world
    first = world.tensor_rank == 0
    counts = world.counts
    zero = torch.zeros((), dtype=torch.float64, device=world.device)
    local = [
        *(total[:2] if first and world.last_stage else (zero, zero)),
        targets.double() if counts else zero,
        zero + (rows_hash if counts else 0),
        zero + float(stop()),
        (total[3] if again is None else total[3] + again[3]) if counts else zero,
        *(again[:2] if again is not None and first and world.last_stage else (zero, zero)),
        zero + (rows_hash % PART if counts else 0),
        zero + rows_hash % PART,
        *(move.update_square.double() for move in moved.values()),
    ]
    vector = torch.stack(local)
    dist.all_reduce(vector)
    return vector.tolist()


@torch.no_grad()
def held_out_loss(state: TrainState, model: Parallelized, held_out: tuple[np.ndarray, int], document: int) -> float:
    """Mean loss over the held-out rows: this replica's (B, T + 1), and how many of them count. A collective."""
    world, (rows, counted) = state.world, held_out
    batch = to_batch(rows, document, world.device)
    batch.targets_BT[counted:] = -1
    total = model.forward_backward(batch.micro(state.run.train.micro_batch), False)
    if world.tensor_rank or not world.last_stage:
        total = torch.zeros_like(total)
    dist.all_reduce(total)
    return float(total[0] / total[1])
