"""One pretended rank of each kind of pipeline stage: its true model, the real schedule, the real optimizer.

A schedule's traffic is a sum over micro-batches and blocks, and so is what it keeps, over those in flight. So it is run
with one and with two micro-batches, through one and through two blocks a chunk, and the rest follows exactly; where
levels move inside rows, in the last blocks, through all of them. Optimizer, weights and windows are always whole.
"""

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from nlscale.config.levels import token_levels
from nlscale.config.run import Run, replicas
from nlscale.model.row_state import RowState, mapped
from nlscale.optim.buffers import BufferShard
from nlscale.optim.build import Optimizer, build_optimizer
from nlscale.optim.mover import Mover
from nlscale.parallel.apply import Parallelized, parallelize
from nlscale.plan.estimate import Estimate
from nlscale.plan.figures import Memory, Moves, Stage, Traffic
from nlscale.plan.ledger import Ledger, storages
from nlscale.plan.pretend import pretended
from nlscale.runtime.wire import axes_of
from nlscale.runtime.world import World


def stages(run: Run, size: int, progress: Callable[[int, int], None] = lambda *_: None) -> list[Stage]:
    """Every pipeline rank, the first replica's; raises UserError where the layout does not fit `size` ranks.

    Ranks between the first and the last differ by what is in flight, so that one of them speaks for all. `progress` hears
    of each rank that is simulated, and of how many there are.
    """
    replicas(run, size)
    count = run.parallel.pipeline

    def simulated(rank: int) -> Stage:
        progress(rank, count)
        return stage(run, size, rank)

    if run.parallel.virtual_pipeline > 1 or count < 4:
        return [simulated(rank) for rank in range(count)]
    first, second, last = (simulated(rank) for rank in (0, 1, count - 1))
    return [first, second, *(at(second, run, size, rank) for rank in range(2, count - 1)), last]


def at(like: Stage, run: Run, size: int, rank: int) -> Stage:
    """The same stage at another place of the pipeline."""
    flying = round(Estimate(run, size).flying(rank))
    kept = like.activations + (flying - like.flying) * like.kept
    return replace(like, index=rank, flying=flying, activations=kept)


def stage(run: Run, size: int, rank: int) -> Stage:
    """One pipeline rank."""
    run = replace(run, train=replace(run.train, compile="none"))  # what is compiled has no shapes to follow
    node = Estimate(run, size).node if run.optim.reduce == "hierarchical" else 0
    ledger = Ledger()
    with pretended(run, size, rank, node, ledger) as world:
        ledger.follow(axes(world))
        model = parallelize(run, world)
        optimizer = build_optimizer(run, model.leaves, world)
        optimizer.await_in(model.modules)
        gc.freeze()  # what stays need not be looked through whenever a schedule's leavings are collected
        try:
            return measured(run, world, rank, model, optimizer, ledger)
        finally:
            gc.unfreeze()


def axes(world: World) -> dict[str, str]:
    """Names of the groups of a world -> what they share."""
    buffers = parallel_state.get_data_parallel_group(with_context_parallel=True)  # megatron-core's own, the same ranks
    held = [("tensor", world.tensor), ("context", world.context), ("pipeline", world.pipeline), ("data", world.data)]
    held += [("data", buffers), ("inside nodes", world.near), ("across nodes", world.far), ("ends", world.ends)]  # type: ignore[list-item]
    return axes_of(held)


def measured(run: Run, world: World, rank: int, model: Parallelized, optimizer: Optimizer, ledger: Ledger) -> Stage:
    """The figures of a rank that is built."""
    estimate = Estimate(run, world.size)
    count, unit = estimate.micro_batches, run.parallel.pipeline if run.parallel.virtual_pipeline > 1 else 1
    for carried in model.carried:
        carried.open()  # one state a micro-batch of the step, however many of them a schedule is run with
    for shard in optimizer.shards():
        if isinstance(shard, BufferShard):
            shard.micro_batches = 0  # nothing leaves before backward's end: all is counted where it is waited for
    built = ledger.live
    optimizer.windows.fill()  # sums of one step, where they do not last: all but the first micro-batch find them there
    sums = ledger.live - built
    peak, traffic = scheduled(run, count, unit, model, ledger)
    # Of interleaved stages, the longer of the two runs has as many in flight as any.
    flying = min(count, 2 * unit) if unit > 1 else round(estimate.flying(rank))
    optimizer.windows.release()
    states = [state for carried in model.carried for state in carried.open()]
    memory, before = held(model, optimizer, states, ledger.live), ledger.live
    optimizer.windows.fill()
    ledger.restart()
    beats = [group.level.steps for group in optimizer.groups if not group.level.frozen]
    sent = {name: attributed(mover, ledger) for name, mover in optimizer.movers.items()}
    optimizer.step(lcm(*beats), torch.ones((), dtype=torch.float64))
    moving, closing = ledger.peak - before, dict(ledger.wire.bytes)
    optimizer.flush(lcm(*beats))  # layers that move at steps of their own
    moves = spoken(optimizer, sent)
    moves += seldom(run, optimizer, sent, moves, lcm(*beats))
    return Stage(
        index=rank,
        memory=memory,
        flying=flying,
        kept=round(peak(2) - peak(1)),
        activations=round(peak(flying)) + sums + memory.states * (count - flying) // count,  # what each row leaves
        moving=moving,
        schedule={key: value(count) for key, value in traffic.items()},
        moves=moves,
        closing=closing,
    )


Sent = dict[str, tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]]


def spoken(optimizer: Optimizer, sent: Sent) -> list[Moves]:
    """What every group sends, by its parts' own word and as it was counted."""
    return [
        Moves(
            mover.group.level.name,
            mover.group.level.steps,
            mover.group.phase,
            mover.group.level.frozen,
            mover.bytes_a_step,
            mover.bytes_a_move,
            sum(leaf.value.numel() for leaf in mover.leaves),
            *(dict(traffic) for traffic in sent[mover.group.name]),
        )
        for mover in optimizer.movers.values()
    ]


def seldom(run: Run, optimizer: Optimizer, sent: Sent, moves: list[Moves], step: int) -> list[Moves]:
    """What M3 sends beside at every `slow_period`-th move, for its slow direction: found in one such move of all groups."""
    slow = run.optim.matrix.slow_period
    if not any((group.level.optimizer or run.optim.name).startswith("m3") for group in optimizer.groups):
        return []
    for _, rule in optimizer.rules():
        rule.updates = slow - 1
    optimizer.step(step, torch.ones((), dtype=torch.float64))
    optimizer.flush(step)
    found = []
    for each, then in zip(moves, spoken(optimizer, sent), strict=True):
        beside = {
            key: size - 2 * each.close.get(key, 0.0) for key, size in then.close.items()
        }  # `then` is of both moves
        if any(beside.values()):
            found.append(Moves(each.level, each.period * slow, each.phase, each.frozen, 0.0, 0.0, 0, {}, beside))
    return found


def attributed(mover: Mover, ledger: Ledger) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """What a group's parts send from now on: at every step, and where it moves."""
    add, close = Counter[tuple[str, str]](), Counter[tuple[str, str]]()

    def counted(function: Callable[..., Any], into: Counter[tuple[str, str]]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            before = Counter(ledger.wire.bytes)
            result = function(*arguments)
            into.update(ledger.wire.bytes - before)
            return result

        return call

    places: list[tuple[Any, str, Counter[tuple[str, str]]]] = []
    for policy, shard in zip(mover.policies, mover.shards, strict=True):
        places += [(policy, "add", add), (policy, "close", close), (shard, "update", close), (shard, "gather", close)]
    for owner, name, into in [*places, *((gram, "close", close) for gram in mover.grams)]:
        setattr(owner, name, counted(getattr(owner, name), into))
    return add, close


def held(model: Parallelized, optimizer: Optimizer, states: list[RowState], live: int) -> Memory:
    """What the storages of a rank that has done nothing yet are for."""
    movers, seen, sizes = list(optimizer.movers.values()), set[int](), dict[str, int]()
    rules = [(mover.group.level, rule) for mover in movers for shard in mover.shards for rule in shard.rules]
    away = [rule for level, rule in rules if optimizer.optim.offload and level.steps >= optimizer.optim.offload]
    tensors = {
        "weights": [
            *(parameter.data for chunk in model.chunks for parameter in chunk.parameters()),
            *(flat for mover in movers for shard in mover.shards for flat in shard.weights),  # type: ignore[attr-defined]
        ],
        "windows": [
            *(window for window in optimizer.windows.sums.values() if window is not None),
            *(each for mover in movers for policy in mover.policies for each in getattr(policy, "sums", [])),
        ],
        "host": [each for rule in away for each in (rule.master, *rule.state.values())],
        "masters": [rule.master for _, rule in rules],
        "moments": [each for _, rule in rules for each in rule.state.values()],
        "states": [part for state in states for part in tensors_of(state)],
    }
    for kind, each in tensors.items():
        found = {key: size for key, size in storages(each).items() if key not in seen}
        seen |= found.keys()
        sizes[kind] = sum(found.values())
    engines = [shard.zero for mover in movers for shard in mover.shards if hasattr(shard, "zero")]
    shapes = [each for engine in engines for group in engine.round_robin_bit16_meta for each in group]
    nothing = sum(storages(shapes).values())  # DeepSpeed keeps these on the meta device everywhere
    return Memory(**sizes, other=live - sum(sizes.values()) - nothing)


def tensors_of(state: RowState) -> list[torch.Tensor]:
    """Every one."""
    found: list[torch.Tensor] = []
    mapped(lambda _, part: found.append(part), "", state)
    return found


def scheduled(
    run: Run, count: int, unit: int, model: Parallelized, ledger: Ledger
) -> tuple[Callable[[int], float], dict[tuple[str, str], Callable[[int], float]]]:
    """Peak of a schedule above what is held between steps, and its traffic, as functions of micro-batches.

    `count`: of a step. The functions are exact at all multiples of `unit`, which a schedule asks for.
    """
    long, (short, longer) = len(model.chunks[0].blocks), lengths(run, model)
    turns = (unit, 2 * unit if count >= 2 * unit else unit)
    peaks, sent = {}, dict[tuple[int, int], Traffic]()
    for place in dict.fromkeys(itertools.product(turns, (short, longer))):
        ledger.restart()
        turn(run, *place, model)  # the first one leaves buffers of megatron-core's, which stay
        peaks[place], sent[place] = float(ledger.peak - ledger.live), dict(ledger.wire.bytes)

    def along(values: dict[tuple[int, int], float]) -> Callable[[int], float]:
        one, two = turns

        def deep(n: int) -> float:
            return values[n, short] + (values[n, longer] - values[n, short]) * (long - short)

        return lambda n: deep(one) + ((n - one) / (two - one) * (deep(two) - deep(one)) if two > one else 0.0)

    keys = dict.fromkeys(key for each in sent.values() for key in each)
    return along(peaks), {key: along({at: each.get(key, 0.0) for at, each in sent.items()}) for key in keys}


def lengths(run: Run, model: Parallelized) -> tuple[int, int]:
    """Blocks of each chunk that a schedule is run through."""
    long = len(model.chunks[0].blocks)
    whole = bool(token_levels(run.levels)) or run.model.reset == "never"  # whose memories are held from turn to turn
    return (long, long) if whole or long < 3 else (1, 2)


def turn(run: Run, count: int, blocks: int, model: Parallelized) -> None:
    """One schedule of `count` micro-batches through the first blocks of each chunk."""
    shape = run.train.micro_batch, run.data.sequence
    tokens, targets = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    with shortened(model, blocks):
        model.forward_backward([(tokens, targets, torch.zeros(shape, dtype=torch.bool))] * count, True)
    gc.collect()  # what is held in cycles alone


@contextmanager
def shortened(model: Parallelized, blocks: int) -> Iterator[None]:
    """Lets a row pass the first blocks of each chunk alone."""
    whole = [chunk.blocks for chunk in model.chunks]
    for chunk in model.chunks:
        chunk.blocks = nn.ModuleList(list(chunk.blocks)[:blocks])
    try:
        yield
    finally:
        for chunk, blocks_ in zip(model.chunks, whole, strict=True):
            chunk.blocks = blocks_
