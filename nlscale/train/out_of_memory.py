"""When memory runs out: what a person needs to know, and what would have helped. The run ends all the same."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nlscale.config.errors import UserError
from nlscale.config.run import Run
from nlscale.plan.estimate import Estimate
from nlscale.runtime.folder import Folder

PHRASES = ("out of memory", "can't allocate memory", "not enough memory")


def remember(allocations: int) -> None:
    """From now on a GPU's allocator notes where its newest `allocations` were asked for (0: none); each costs a stack."""
    if allocations and torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=allocations, stacks="python")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on a GPU or on the host."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES))


def remedies(run: Run, size: int) -> list[str]:
    """Settings with which a rank of `size` would hold less by formula, the largest saving last; what the config refuses is
    left out.
    """
    train, optim, parallel = run.train, run.optim, run.parallel
    slow = next((level.steps for level in run.levels if level.steps >= 16), 0)
    tried: list[tuple[str, Callable[[], Run]]] = [
        (f"train.micro_batch={train.micro_batch // 2}", lambda: with_train(micro_batch=train.micro_batch // 2)),
        ("train.recompute=block", lambda: with_train(recompute="block")),
        ("optim.reduce=eager", lambda: replace(run, optim=replace(optim, reduce="eager"))),
        (f"optim.offload={slow}", lambda: replace(run, optim=replace(optim, offload=slow))),
        (
            f"parallel.tensor={parallel.tensor * 2} parallel.sequence=true",
            lambda: with_parallel(tensor=parallel.tensor * 2, sequence=True),
        ),
        (f"parallel.pipeline={parallel.pipeline * 2}", lambda: with_parallel(pipeline=parallel.pipeline * 2)),
    ]

    def with_train(**changes: Any) -> Run:
        return replace(run, train=replace(train, **changes))

    def with_parallel(**changes: Any) -> Run:
        return replace(run, parallel=replace(parallel, **changes))

    now, found = Estimate(run, size).largest, []
    for words, made in tried:
        with contextlib.suppress(UserError):
            other = made()
            ranks = size if size % other.parallel.ranks == 0 else size * 2
            if (held := Estimate(other, ranks).largest) < 0.99 * now:
                found.append((held, words + (f" (on {ranks} ranks)" if ranks != size else "")))
    return [words for _, words in sorted(found, reverse=True)]


def explained(error: BaseException, run: Run, folder: Folder, rank: int, size: int) -> str:
    """One line: what ran out, what was held, what to change. On a GPU the logs have a snapshot of the allocator."""
    said = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no memory left'}"]
    if torch.cuda.is_available():
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        said.append(f"{held / 2**30:.1f} GiB allocated, {peak / 2**30:.1f} at the peak")
        if (where := snapshot(folder, rank)) is not None:
            stacks = "" if run.log.allocations else " (log.allocations=100000 would add who asked for what)"
            said.append(f"snapshot: {where}{stacks}")
    if found := remedies(run, size):
        said.append(f"less would be needed with {', or '.join(found)}; `nlscale plan` says how much")
    return "; ".join(said)


def snapshot(folder: Folder, rank: int) -> Path | None:
    """Writes what the allocator holds, for https://docs.pytorch.org/memory_viz; None where the disk refuses."""
    attempts = folder.attempts()
    target = (attempts[-1] if attempts else folder.path) / f"memory-rank-{rank:05d}.pickle"
    try:
        torch.cuda.memory._dump_snapshot(str(target))
    except OSError:
        return None
    return target
