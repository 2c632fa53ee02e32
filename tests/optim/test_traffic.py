"""What crosses replicas, counted on the wire: a level pays when it moves, and only then (I18)."""

import pytest
import torch
from megatron.core import parallel_state

from nlscale.config.levels import due, level_of
from nlscale.runtime.wire import Wire
from nlscale.testing import ranks
from tests.optim.driver import LAYOUTS, built, usual
from tests.tiny import tiny

PERIOD = 4  # lcm of the periods 1, 2, 4


def traffic(overrides: list[str]) -> list[tuple[float, int, float, list[str]]]:
    """(bytes on the wire, reported, by the formula; levels whose weights changed) of each of 8 steps."""
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    buffers = parallel_state.get_data_parallel_group(with_context_parallel=True)  # megatron-core's own, the same ranks
    size = model.leaves[0].value.element_size()
    held = {level.name: 0 for level in run.levels}
    for leaf in model.leaves:
        held[level_of(leaf.name, run.levels).name] += leaf.value.numel() * size
    seen = []
    for step in range(1, 9):
        before = {name: [leaf.value.clone() for leaf in mover.leaves] for name, mover in optimizer.movers.items()}
        with Wire(world.data, world.near, world.far, buffers) as wire:
            tokens = model.forward_backward(usual(run, step, world), True)[2].long()
            moved = optimizer.step(step, tokens)
        changed = [
            name
            for name, mover in optimizer.movers.items()
            if any(not torch.equal(old, leaf.value) for old, leaf in zip(before[name], mover.leaves, strict=True))
        ]
        assert changed == list(moved)
        formula = sum(
            cost(run.optim.reduce, held[level.name], world.replicas, run.optim.node or 1, due(level, step))
            for level in run.levels
        )
        seen.append((wire.sent, sum(optimizer.bytes_sent(moved).values()), formula, changed))
    return seen


def cost(policy: str, held: int, replicas: int, node: int, moves: bool) -> float:
    """Spec 3.10, gradients and weights of one size."""
    share = (replicas - 1) / replicas * held
    nodes = replicas // node
    every = {"defer": 0.0, "eager": share, "hierarchical": (node - 1) / node * held}[policy]
    boundary = {"defer": share, "eager": 0.0, "hierarchical": (nodes - 1) / nodes * held / node}[policy] + share
    return every + (boundary if moves else 0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["data", "data4", "tensor-data", "pipeline-data"])
def test_i18_counted_bytes_are_the_formula(layout: str, precision: str) -> None:
    count, overrides = LAYOUTS[layout]
    for steps in ranks(count, traffic, [*overrides, f"train.precision={precision}"]):
        counted, reported, formula, _ = (list(column) for column in zip(*steps, strict=True))
        assert counted == reported == formula
        assert counted[0] < counted[1] < counted[3] and counted[:PERIOD] == counted[PERIOD:]


def test_i18_counts_the_inputs_of_the_delta_rule() -> None:
    for steps in ranks(2, traffic, ["optim.name=dgd"]):
        assert [counted for counted, *_ in steps] == [reported for _, reported, *_ in steps]


def test_i18_holds_behind_backward() -> None:
    for steps in ranks(2, traffic, ["optim.overlap=true", "model.hidden=512"]):
        counted, reported, formula, _ = (list(column) for column in zip(*steps, strict=True))
        assert counted == reported == pytest.approx(formula, rel=0.01)  # megatron-core pads a bucket to 128 elements


@pytest.mark.parametrize(("policy", "node"), [("eager", 1), ("hierarchical", 2), ("hierarchical", 4)])
def test_i18_holds_for_every_policy(policy: str, node: int) -> None:
    for steps in ranks(4, traffic, [f"optim.reduce={policy}", f"optim.node={node}"]):
        assert [counted for counted, *_ in steps] == [reported for _, reported, *_ in steps]
        assert [counted for counted, *_ in steps] == [formula for _, _, formula, _ in steps]


def test_i18_holds_for_whole_matrices() -> None:
    for steps in ranks(4, traffic, ["optim.name=muon"]):
        counted, reported, formula, _ = (list(column) for column in zip(*steps, strict=True))
        assert counted == reported
        assert sum(formula) <= sum(counted) <= 1.05 * sum(formula)  # slots hold whole matrices: some padding travels


def test_due_levels_are_a_prefix_and_weights_change_exactly_then() -> None:
    levels = tiny().levels
    for step, (_, _, _, changed) in enumerate(ranks(2, traffic, [])[0], 1):
        assert changed == [level.name for level in levels if due(level, step)]
        assert changed == [level.name for level in levels][: len(changed)]


FOUR = (
    "levels=[{name: fast, period: 1, width: 0.25}, {name: medium, period: 4, width: 0.25}, "
    "{name: slow, period: 16, width: 0.25}, {name: long, period: 64, width: 0.25}]"
)


def volumes(phase: str) -> list[float]:
    """Bytes of each of 64 steps in units of one level's move, the first level's trunk left out."""
    run = tiny(FOUR, "model.layers=24", "model.width=16", "model.heads=2", f"optim.phase={phase}")
    _, _, optimizer = built(run)
    long = sum(m.bytes_a_move for m in optimizer.movers.values() if m.group.level.name == "long")
    sizes = {name: 1.0 if m.group.level.period == 1 else m.bytes_a_move / long for name, m in optimizer.movers.items()}
    return [
        sum(sizes[g.name] for g in optimizer.groups if g.name in sizes and due(g.level, step, g.phase))
        for step in range(1, 65)
    ]


def test_staggered_phases_spread_the_work() -> None:
    aligned, staggered = (ranks(2, volumes, phase)[0] for phase in ("aligned", "staggered"))
    assert max(aligned) == pytest.approx(4)
    assert max(staggered) == pytest.approx(1.375) and max(staggered) <= 1.4
    assert sum(staggered) == pytest.approx(sum(aligned)) == pytest.approx(64 * (1 + 1 / 4 + 1 / 16 + 1 / 64))
