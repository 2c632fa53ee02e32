"""One step: rows -> loss -> windows -> the levels that are due -> one small reduction of what to report."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.data.batch import HASH_BITS, to_batch, token_hash
from nlscale.optim.shard import Moved
from nlscale.parallel.apply import Parallelized
from nlscale.train.state import TrainState


@dataclass(frozen=True)
class Report:
    """What one step did, equal on all ranks."""

    loss: float  # mean over all targets of the step
    tokens: int
    token_hash: int
    stop: bool  # a rank was asked to stop
    seconds: float
    data_wait: float
    grad_norm: dict[str, float] = field(default_factory=dict)  # of the levels that moved
    update_norm: dict[str, float] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()  # levels that were due, but whose gradients were not finite


def train_step(state: TrainState, model: Parallelized, document: int, stop: bool) -> Report:
    """Takes the next rows and makes one step of all levels that are due."""
    run, world, began = state.run, state.world, time.monotonic()
    rows = next(state.loader)
    waited = time.monotonic() - began
    batch = to_batch(rows, document, world.device)
    total = model.forward_backward(batch.micro(run.train.micro_batch), True)
    state.step += 1
    targets = (batch.targets_BT >= 0).sum()
    moved = state.optimizer.step(state.step, targets)
    if state.step == run.train.steps:
        moved |= state.optimizer.flush(state.step)
    report = reduced(state, total, token_hash(rows), targets, moved, stop)
    state.tokens += int(report[1])
    squares = dict(zip(moved, report[4:], strict=True))
    return Report(
        loss=report[0] / max(1.0, report[1]),
        tokens=int(report[1]),
        token_hash=int(report[2]) % 2**HASH_BITS,
        stop=report[3] > 0,
        seconds=time.monotonic() - began,
        data_wait=waited,
        grad_norm={name: float(move.grad_norm) for name, move in moved.items() if not move.skipped},
        update_norm={name: square**0.5 for name, square in squares.items() if not moved[name].skipped},
        skipped=tuple(name for name, move in moved.items() if move.skipped),
    )


def reduced(
    state: TrainState, total: Tensor, rows_hash: int, targets: Tensor, moved: dict[str, Moved], stop: bool
) -> list[float]:
    """Sums over all ranks, in one collective: loss, tokens, hash, stop, squared update of each moved level."""
    world = state.world
    first = world.tensor_rank == 0
    counts = first and world.pipeline_rank == 0
    zero = torch.zeros((), dtype=torch.float64, device=world.device)
    local = [
        total[0] if first and world.last_stage else zero,
        targets.double() if counts else zero,
        zero + (rows_hash if counts else 0),
        zero + float(stop),
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
