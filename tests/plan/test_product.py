"""Every layout of four ranks, with every reduction and three kinds of mixer: a plan's bytes are the counted ones."""

from collections.abc import Iterator
from itertools import product

import pytest

from nlscale.config.run import Run
from nlscale.plan.simulate import Stage, stages
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.plan.test_simulate import Bytes, agree, sent, significant
from tests.sampled import sampled
from tests.tiny import tiny

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


def counted(every: dict[str, Run]) -> tuple[int, dict[str, Bytes]]:
    """Pipeline rank, and what it sends in each run."""
    first = next(iter(every.values()))
    node = NODE if any(run.optim.node for run in every.values()) else 0
    world = join(first.parallel, first.cluster, first.train.seed, node)
    return world.pipeline_rank, {name: sent(run, world) for name, run in every.items()}


def planned(every: dict[str, Run]) -> dict[str, list[Stage]]:
    """By a pretended rank of each stage."""
    return {name: stages(run, RANKS) for name, run in every.items()}


ALL, FEW = list(layouts()), [(2, 2, 1, True, 2)]


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
            agree(run, plan[name][place], bytes_of[name])
            assert any(map(significant, bytes_of[name])), name
