"""A pretended rank sends what a real one sends, to the byte, and holds what a real one holds."""

from collections import Counter

import pytest
import torch

from nlscale.bench import memory
from nlscale.config.errors import UserError
from nlscale.config.run import Run
from nlscale.model.row_state import mapped
from nlscale.optim.build import build_optimizer
from nlscale.parallel.apply import parallelize
from nlscale.plan.estimate import Estimate
from nlscale.plan.figures import Moves
from nlscale.plan.holding import carried
from nlscale.plan.ledger import Ledger
from nlscale.plan.pretend import pretended
from nlscale.plan.report import in_all, over_steps, traffic
from nlscale.plan.simulate import Stage, axes, stages, turn
from nlscale.runtime.wire import Axes
from nlscale.runtime.world import World, join
from nlscale.testing import ranks
from tests.optim.driver import built, usual
from tests.sampled import sampled
from tests.tiny import tiny

LAYOUTS = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "tensor4": ["parallel.tensor=4", "model.kv_heads=4"],
    "pipeline": ["parallel.pipeline=2"],
    "pipeline4": ["parallel.pipeline=4"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "tensor-pipeline": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"],
    "context": ["parallel.context=2"],
    "context-tensor": ["parallel.context=2", "parallel.tensor=2", "model.kv_heads=4"],
    "tied": ["parallel.pipeline=2", "model.tied=true"],
    "recompute": ["parallel.tensor=2", "train.recompute=block", "parallel.sequence=true"],
    "eager": ["optim.reduce=eager"],
    "hierarchical": ["optim.reduce=hierarchical", "optim.node=2"],
    "overlap": ["optim.overlap=true", "model.hidden=512"],
    "overlap-buckets": ["optim.overlap=true", "model.layers=8", "optim.bucket=1", "parallel.pipeline=2"],
    "muon": ["optim.name=muon", "parallel.tensor=2"],
    "staggered": ["optim.phase=staggered", "parallel.pipeline=2"],
    "hope": ["model.mixer=self_modifying", "model.self_modifying.chunk=8", "parallel.tensor=2"],
    "hope-context": ["model.mixer=self_modifying", "model.self_modifying.chunk=8", "parallel.context=2"],
    "delta-context": ["model.mixer=delta", "model.linear.chunk=4", "parallel.context=2"],
    "bf16": ["train.precision=bf16", "parallel.tensor=2"],
    "transferred": ["model.base_width=16", "parallel.pipeline=2"],
    "long": ["model.layers=8", "parallel.pipeline=2", "parallel.tensor=2"],
    "in-sequence": ["use.levels=inside", "parallel.tensor=2"],
    "in-sequence-context": ["use.levels=inside", "parallel.context=2"],
    "context4": ["parallel.context=4", "model.kv_heads=4"],
    "context-pipeline": ["parallel.context=2", "parallel.pipeline=2"],
    "context-sequence": ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true", "model.kv_heads=4"],
    "tensor-interleaved": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "interleaved4": ["parallel.pipeline=4", "parallel.virtual_pipeline=2", "model.layers=8"],
}


LEFT = (
    "data",
    "tensor",
    "sequence",
    "tensor4",
    "pipeline",
    "context",
    "recompute",
    "bf16",
    "delta-context",
    "transferred",
)
LEFT += ("context4", "context-pipeline", "tensor-interleaved", "interleaved4")


def configured(overrides: list[str]) -> Run:
    inside = ["levels=[{name: quick, period: 8, unit: token, width: 0.5}, {name: fast, period: 1, width: 0.5}]"]
    if "use.levels=inside" in overrides:
        overrides = inside + [each for each in overrides if "level" not in each]
    return tiny(*overrides)


Bytes = tuple[dict, dict]  # of a schedule, and of the end of a step in which every level moves


def sent(run: Run, world: World) -> Bytes:
    """By a real rank."""
    model = parallelize(run, world)
    optimizer = build_optimizer(run, model.leaves, world, 100)
    optimizer.await_in(model.modules)
    with Axes(axes(world)) as wire:
        tokens = model.forward_backward(usual(run, 1, world), True)[2].long()
        schedule = dict(wire.bytes)
        wire.bytes.clear()
        optimizer.step(4, tokens)
    return schedule, dict(wire.bytes)


def counted(overrides: list[str]) -> tuple[int, Bytes]:
    """Pipeline rank, and what it sends."""
    run = configured(overrides)
    world = join(run.parallel, run.cluster, run.train.seed, run.optim.node)
    return world.pipeline_rank, sent(run, world)


def planned(overrides: list[str]) -> list[Stage]:
    return stages(configured(overrides), 4)


def agree(run: Run, stage: Stage, heard: Bytes) -> None:
    """A plan's bytes are the counted ones."""
    said, seen = ([significant(part) for part in parts] for parts in ((stage.schedule, stage.closing), heard))
    if run.optim.overlap:  # what hides behind the last micro-batch, a plan counts where it is waited for
        said, seen = ([Counter(each[0]) + Counter(each[1])] for each in (said, seen))
    assert said == seen, stage.index


def significant(traffic: dict) -> dict:
    """Without the few numbers on which all ranks agree at a step's end, whose size a run's metrics decide."""
    return {key: value for key, value in traffic.items() if key[0] != "others" and value}


@pytest.mark.parametrize("layout", sampled(LAYOUTS, LEFT))
def test_predicted_bytes_are_the_counted_ones(layout: str) -> None:
    (plan,) = ranks(1, planned, LAYOUTS[layout])
    seen = ranks(4, counted, LAYOUTS[layout], timeout=240)
    run = configured(LAYOUTS[layout])
    inner = run.parallel.tensor * run.parallel.context
    for rank in range(0, run.parallel.ranks, inner):  # the first replica's first rank of each stage
        place, heard = seen[rank]
        agree(run, plan[place], heard)
    assert any(significant(stage.closing) or significant(stage.schedule) for stage in plan)


@pytest.mark.parametrize("layout", ["pipeline", "eager", "hierarchical", "muon", "staggered", "tied", "in-sequence"])
def test_levels_pay_for_their_own_moves(layout: str) -> None:
    """By level, axis and collective: what was counted is what the levels' parts say of themselves, and nothing is left."""
    run = configured(LAYOUTS[layout])
    (plan,) = ranks(1, planned, LAYOUTS[layout])
    for stage in plan:
        total = Counter[tuple[str, str]]()
        for each in stage.moves:
            over_data = [
                sum(size for (axis, _), size in part.items() if axis in OVER) for part in (each.add, each.close)
            ]
            if layout != "muon":  # whose matrices are gathered by more than one group
                assert over_data == [each.every_step, each.a_move], each
            total.update(each.add)
            total.update(each.close)
        if layout != "staggered":  # whose layers never move all at once
            assert significant(total) == significant(stage.closing)
        assert {each.level for each in stage.moves} == {level.name for level in run.levels}


OVER = ("data", "inside nodes", "across nodes")


def test_a_plan_says_what_the_busiest_step_sends() -> None:
    """Layers that move at steps of their own never send all at once; rows and sum agree on what that spares."""
    aligned, staggered = (ranks(1, planned, ["parallel.pipeline=2", *more])[0][0] for more in ([], STAGGERED))
    for stage in (aligned, staggered):
        assert in_all(stage)[0] == pytest.approx(sum(row["mean"] for row in traffic(stage)))
    assert in_all(aligned)[0] == pytest.approx(in_all(staggered)[0], rel=0.01)
    assert in_all(aligned)[1] == pytest.approx(sum(row["peak"] for row in traffic(aligned)))
    assert in_all(staggered)[1] < in_all(aligned)[1]
    kinds = {(row["of"], row["axis"], row["kind"]) for row in traffic(aligned)}
    assert {("slow", "data", "all-gather"), ("forward, backward", "pipeline", "send")} <= kinds


STAGGERED = ["optim.phase=staggered"]


MEASURED = [
    ("10M", 1, ""),
    ("10M", 2, ""),
    ("10M", 2, "parallel.tensor=2"),
    ("10M", 2, "parallel.pipeline=2"),
    ("10M", 1, "train.recompute=block"),
    ("10M", 2, "optim.reduce=eager"),
    ("40M", 1, ""),
    ("125M", 1, ""),
]


@pytest.mark.parametrize(("size", "count", "override"), sampled(MEASURED, MEASURED[1:]))
def test_predicted_memory_is_the_measured_one(size: str, count: int, override: str) -> None:
    run = memory.configure(size, "four", count, *([override] if override else []))
    for row in memory.compared(size, run, count):
        assert row.ok, row


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="6 ranks cannot hold whole replicas"):
        stages(tiny("parallel.tensor=4", "model.kv_heads=4"), 6)


def test_a_world_that_is_joined_cannot_be_pretended() -> None:
    def both() -> str:
        run = tiny()
        built(run)
        try:
            stages(run, 1)
        except RuntimeError as error:
            return str(error)
        return ""

    assert "another process" in ranks(1, both)[0]


def test_what_is_remembered_of_an_operation_is_what_it_would_say_again() -> None:
    """Views that are not marked as such share memory at every call, not at the first alone."""

    def peaks() -> list[int]:
        ledger, found = Ledger(), []
        with pretended(tiny(), 1, 0, None, ledger):
            for _ in range(3):
                ledger.restart()
                before = ledger.live
                x = torch.ones(4, 8, 16)
                y = torch.ops.aten._unsafe_view(x, [32, 16]) + 1.0
                found.append(ledger.peak - before)
                del x, y
        return found

    ((first, *others),) = ranks(1, peaks)
    assert first == 2 * 4 * 8 * 16 * 4 and others == [first, first]


def test_memories_that_go_on_are_planned_too() -> None:
    kept = ["model.reset=never", "data.shuffle=false", "model.layers=4", "model.mixer=delta", "model.linear.chunk=4"]
    ((carried,),) = ranks(1, planned_alone, kept)
    ((fresh,),) = ranks(1, planned_alone, kept[2:])
    assert carried.resident > fresh.resident
    assert carried.memory.states == ranks(1, held_by_memories, kept)[0] > 0 and fresh.memory.states == 0


def test_what_each_row_leaves_is_in_the_plans_peak() -> None:
    """After-states of all micro-batches wait for the step's end, however few a plan runs."""
    kept = [
        "model.reset=never",
        "data.shuffle=false",
        "model.mixer=delta",
        "model.linear.chunk=4",
        "train.global_batch=24",
    ]
    ((plan,),) = ranks(1, planned_alone, kept)
    assert plan.activations == pytest.approx(ranks(1, whole_turn, kept)[0], rel=0.005)


NEVER = ["model.reset=never", "data.shuffle=false"]
CARRIED = {
    "delta": ["model.mixer=delta", "model.linear.chunk=4"],
    "titans": ["model.mixer=titans", "model.titans.chunk=4"],
    "titans_mac": ["model.mixer=titans_mac", "model.titans.chunk=4", "parallel.pipeline=2"],
    "hope": ["model.mixer=self_modifying", "model.self_modifying.chunk=8", "parallel.tensor=2"],
    "in a row": ["levels=[{name: quick, period: 8, unit: token, width: 0.5}, {name: fast, period: 1, width: 0.5}]"],
}


@pytest.mark.parametrize("case", CARRIED)
def test_states_by_formula_are_those_of_the_simulation(case: str) -> None:
    run = configured([*NEVER, *CARRIED[case]])
    for stage in ranks(1, planned, [*NEVER, *CARRIED[case]])[0]:
        assert Estimate(run, 4).memory(stage.index).states == pytest.approx(stage.memory.states, rel=0.02)
    assert sum(carried(run)) > 0


def whole_turn(overrides: list[str]) -> int:
    """Peak of a schedule of all micro-batches, above what is held between steps."""
    run, ledger = tiny(*overrides), Ledger()
    with pretended(run, 1, 0, None, ledger) as world:
        model = parallelize(run, world)
        optimizer = build_optimizer(run, model.leaves, world)
        for _ in range(2):
            ledger.restart()
            turn(run, run.train.global_batch // run.train.micro_batch, run.model.layers, model)
        optimizer.windows.release()
        return ledger.peak - ledger.live


def held_by_memories(overrides: list[str]) -> int:
    """Bytes of a real rank's, over all rows of a step."""
    sizes: list[int] = []
    for chunk in built(tiny(*overrides))[1].carried:
        for state in chunk.open():
            mapped(lambda _, part: sizes.append(part.untyped_storage().nbytes()), "", state)
    return sum(sizes)


def planned_alone(overrides: list[str]) -> list[Stage]:
    return stages(tiny(*overrides), 1)


def test_the_busiest_step_is_found_where_periods_are_no_chain() -> None:
    """M3's slow direction beside layers that move at steps of their own."""
    beats = [(8, 0, 1.0), (40, 0, 10.0), (16, 8, 100.0)]
    moves = [(Moves("fast", period, phase, False, 0, 0, 0, {}, {}), 0.0, size) for period, phase, size in beats]
    every = [sum(size for period, phase, size in beats if (step + phase) % period == 0) for step in range(80)]
    assert over_steps(moves) == (pytest.approx(sum(every) / 80), max(every)) and max(every) == 111


M3 = ["optim.name=m3", "optim.matrix.slow_period=2", "parallel.tensor=2"]


def two_moves(overrides: list[str]) -> dict[tuple[str, str], int]:
    """Bytes that the second move of all levels sends beyond the first one's."""
    run = configured(overrides)
    world, model, optimizer = built(run)
    optimizer.await_in(model.modules)
    seen = []
    for step in (4, 8):
        tokens = model.forward_backward(usual(run, step, world), True)[2].long()
        with Axes(axes(world)) as wire:
            optimizer.step(step, tokens)
        seen.append(Counter(wire.bytes))
    return dict(seen[1] - seen[0])


def test_a_slow_direction_is_planned_at_its_own_period() -> None:
    (plan,) = ranks(1, planned, M3)
    for stage in plan:
        rare = [each for each in stage.moves if not each.parameters]
        assert sorted(each.period for each in rare) == [2, 4, 8]
        total = Counter[tuple[str, str]]()
        for each in rare:
            total.update(each.close)
        assert significant(total) == significant(ranks(4, two_moves, M3, timeout=240)[0]) != {}
    ((muon,), (plain,)) = (ranks(1, planned, [f"optim.name={name}", *M3[1:]])[0] for name in ("muon", "m3"))
    assert in_all(plain)[0] > in_all(muon)[0]
