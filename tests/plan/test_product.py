"""Every layout of four ranks, with every reduction and three kinds of mixer: a plan's bytes are the counted ones."""

from collections import Counter
from collections.abc import Iterator
from itertools import product

import pytest

from nlscale.config.run import Run
from nlscale.optim.build import build_optimizer
from nlscale.parallel.apply import parallelize
from nlscale.plan.simulate import Stage, axes, stages
from nlscale.runtime.wire import Axes
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.plan.test_simulate import halves, significant
from tests.sampled import sampled
from tests.tiny import micro_batches, tiny

RANKS, NODE = 4, 2
DEEP = ["model.layers=8", "model.kv_heads=4"]  # a layer for each chunk of four stages, a head for each of four ranks
REDUCTIONS = {
    "defer": [],
    "eager": ["optim.reduce=eager"],
    "hierarchical": ["optim.reduce=hierarchical", f"optim.node={NODE}"],
    "overlap": ["optim.overlap=true"],
}
MIXERS = {
    "attention": [],
    "hope": ["model.mixer=self_modifying", "model.self_modifying.chunk=8"],
    "delta": ["model.mixer=delta", "model.linear.chunk=4"],
}


def layouts() -> Iterator[tuple[int, int, int, bool, int]]:
    """Tensor, pipeline, context, sequence, chunks a stage: all whose product divides the ranks."""
    degrees = (1, 2, 4)
    for tensor, pipeline, context in product(degrees, degrees, degrees):
        if RANKS % (tensor * pipeline * context) == 0:
            for sequence, chunks in product((False, True)[: min(tensor, 2)], (1, 2)[: min(pipeline, 2)]):
                yield tensor, pipeline, context, sequence, chunks


def replicas_of(layout: tuple[int, int, int, bool, int]) -> int:
    """Of the model on all ranks."""
    tensor, pipeline, context, _, _ = layout
    return RANKS // (tensor * pipeline * context)


def runs(layout: tuple[int, int, int, bool, int]) -> dict[str, Run]:
    """Of one layout; nodes of two replicas only where there are as many."""
    fields = ("tensor", "pipeline", "context", "sequence", "virtual_pipeline")
    shape = [f"parallel.{field}={str(value).lower()}" for field, value in zip(fields, layout, strict=True)]
    found = {}
    for (reduction, how), (mixer, what) in product(REDUCTIONS.items(), MIXERS.items()):
        if reduction != "hierarchical" or replicas_of(layout) % NODE == 0:
            found[f"{reduction}, {mixer}"] = tiny(*DEEP, *shape, *how, *what)
    return found


Bytes = tuple[dict, dict]


def counted(every: dict[str, Run]) -> tuple[int, dict[str, Bytes]]:
    """Pipeline rank; of each run the bytes of a schedule, and of the end of a step in which every level moves."""
    first, found = next(iter(every.values())), {}
    node = NODE if any(run.optim.node for run in every.values()) else 0
    world = join(first.parallel, first.cluster, first.train.seed, node)
    for name, run in every.items():
        model = parallelize(run, world)
        optimizer = build_optimizer(run, model.leaves, world, 100)
        optimizer.await_in(model.modules)
        with Axes(axes(world)) as wire:
            rows = micro_batches(run, 1, world.replica, world.replicas)
            tokens = model.forward_backward(rows, True)[2].long()
            schedule = dict(wire.bytes)
            wire.bytes.clear()
            optimizer.step(4, tokens)
        found[name] = schedule, dict(wire.bytes)
    return world.pipeline_rank, found


def planned(every: dict[str, Run]) -> dict[str, list[Stage]]:
    """By a pretended rank of each stage."""
    return {name: stages(run, RANKS) for name, run in every.items()}


ALL, FEW = list(layouts()), [(2, 2, 1, True, 2), (1, 1, 2, False, 1)]


@pytest.mark.parametrize(
    "layout", sampled([(each,) for each in ALL], [(each,) for each in ALL if each not in FEW]), ids=str
)
def test_of_every_layout_the_predicted_bytes_are_the_counted_ones(layout: tuple[int, int, int, bool, int]) -> None:
    every = runs(layout)
    assert len(every) == (12 if replicas_of(layout) > 1 else 9)
    (plan,) = ranks(1, planned, every, timeout=600)
    seen = ranks(RANKS, counted, every, timeout=600)
    for rank in range(0, layout[0] * layout[1] * layout[2], layout[0] * layout[2]):  # the first of each stage
        place, bytes_of = seen[rank]
        for name, run in every.items():
            said, heard = (
                [significant(part) for part in parts] for parts in (halves(plan[name][place]), bytes_of[name])
            )
            if run.optim.overlap:  # what hides behind the last micro-batch, a plan counts where it is waited for
                said, heard = ([Counter(each[0]) + Counter(each[1])] for each in (said, heard))
            assert said == heard, (name, place)
            assert any(heard), name
