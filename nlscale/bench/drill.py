"""Small models trained in this process on rows that a function makes: what the benches of memory tasks share."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from statistics import mean, stdev
from typing import Any, TypeVar

import torch
from nlscale_launch.local import free_port
from torch import Tensor

from nlscale.config.run import Run
from nlscale.optim.build import Optimizer, build_optimizer
from nlscale.parallel.apply import Parallelized, parallelize
from nlscale.runtime.world import join, leave

Rows = tuple[Tensor, Tensor]  # tokens and targets (B, T)
Made = Callable[[int], Rows]  # rows of a step, from 1
Seen = Callable[[int, float], None]  # is told of a step and its mean loss
Key = TypeVar("Key")
Found = TypeVar("Found")


def side_by_side(work: Callable[..., Found], jobs: Mapping[Key, Sequence[Any]]) -> Iterator[tuple[Key, Found]]:
    """Each job's key and what `work` makes of its arguments, in their order, in fresh processes, one a core; after an error
    none begins.
    """
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        waiting = {key: pool.submit(work, *given) for key, given in jobs.items()}
        try:
            for key, job in waiting.items():
                yield key, job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def alone(
    run: Run, steps: int, weights: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[Parallelized, Optimizer]]:
    """The run's model on this process alone, and its optimizer; this process may do so again.

    `weights`: what it begins with, by leaf; None: the run's own initial values.
    """
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    world = join(run.parallel, run.cluster, 0)
    try:
        model = parallelize(run, world)
        for leaf in model.leaves if weights else ():
            leaf.value.copy_(weights[leaf.name])  # type: ignore[index]
        yield model, build_optimizer(run, model.leaves, world, steps)
    finally:
        leave()


def trained(model: Parallelized, optimizer: Optimizer, steps: int, made: Made, seen: Seen = lambda *_: None) -> None:
    """Trains for so many steps; rows are one document each."""
    for step in range(1, steps + 1):
        tokens, targets = made(step)
        total = model.forward_backward([(tokens, targets, torch.zeros_like(tokens, dtype=torch.bool))], True)
        optimizer.step(step, total[2].long())
        seen(step, float(total[0] / total[1]))


def apart(values: Sequence[float], control: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, seed by seed, and its standard error (0 of one seed)."""
    each = [value - other for value, other in zip(values, control, strict=True)]
    return mean(each), stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0


def right(model: Parallelized, rows: Rows) -> Tensor:
    """Whether each answer is the target (B, T)."""
    return scores(model, rows).argmax(-1) == rows[1]


@torch.no_grad()
def scores(model: Parallelized, rows: Rows) -> Tensor:
    """Logits (B, T, V); levels that move inside a row learn from its targets as they read."""
    (tokens, targets), hope = rows, model.chunks[0]
    heard: list[Tensor] = []  # by the head, a chunk at a time where levels move inside the row
    hook = hope.head.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    try:
        hope.onward((tokens, targets, torch.zeros_like(tokens, dtype=torch.bool)))
    finally:
        hook.remove()
    logits: Tensor = hope.head.logits(torch.cat(heard))
    return logits.transpose(0, 1)
