"""What levels keep of earlier tasks: pulls to old weights (row 29) and directions that moves stay off (row 33)."""

import pytest
import torch
from torch import Tensor

from nlscale.optim.tasks import DIRECTION, held
from nlscale.testing import ranks
from tests.optim.driver import CONSTANT, built, usual, weights
from tests.sampled import sampled
from tests.tiny import tiny
from tests.whole import Pieces, assemble

LEVELS = "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 2, width: 0.5%s}]"
SLOW = ".slow."


def two_tasks(overrides: list[str], ends: bool = True) -> tuple[Pieces, Pieces, list[Tensor]]:
    """Weights after the first task and after the second; dot products of the slow level's kept directions and its way."""
    run = tiny(*CONSTANT, *overrides)
    world, model, optimizer = built(run, torch.float64)

    def steps(first: int, last: int) -> None:
        for step in range(first, last + 1):
            optimizer.step(step, model.forward_backward(usual(run, step, world), True)[2].long())

    steps(1, 8)
    between = weights(model, world)
    if ends:
        optimizer.tasks.end([level.name for level in run.levels])
    mover = optimizer.movers["slow"]
    places = mover.group.level.project
    masters = [rule.master.clone() for rule, _ in held(mover)]
    steps(9, 14)
    products = [
        torch.tensor([float((rule.state[f"{DIRECTION}{i}"] * (rule.master - old)).sum()) for i in range(places)])
        for (rule, _), old in zip(held(mover), masters, strict=True)
    ]
    return between, weights(model, world), products


def moved(overrides: list[str], layout: list[str] = [], count: int = 1) -> dict[str, Tensor]:  # noqa: B006
    """How far every leaf went in the second task."""
    results = ranks(count, two_tasks, [*overrides, *layout])
    before, after = assemble([r[0] for r in results]), assemble([r[1] for r in results])
    return {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_row_29_an_anchor_holds_as_hard_as_it_is_said_to(rule: str) -> None:
    common = [f"optim.name={rule}", "optim.weight_decay=0"]
    free = moved([LEVELS % "", *common])
    none = moved([LEVELS % ", anchor: 0.0", *common])
    some, firm = (moved([LEVELS % f", anchor: {value}", *common]) for value in (30.0, 1e30))
    slow = [name for name in free if SLOW in name]
    assert slow and all(torch.equal(none[name], free[name]) for name in free)
    assert all(0 < some[name].norm() < 0.95 * free[name].norm() for name in slow)
    for name in slow:  # what no gradient has reached has no importance, and is free
        assert firm[name].norm() < 1e-6 * free[name].norm()
    assert all(firm[name].norm() > 0.3 * free[name].norm() for name in free if SLOW not in name)


def test_row_29_the_pull_is_the_implicit_step_of_the_penalty() -> None:
    """(w - w*) after = (w - w* of the rule's own step) / (1 + rate anchor F), F = 1 while no task has ended."""
    common = ["optim.name=sgd", "optim.weight_decay=0", "optim.clip=0", "optim.kappa=0"]
    (free, start), (pulled, _) = (ranks(1, first_move, [LEVELS % f", anchor: {a}", *common])[0] for a in (1e-300, 7.0))
    expected = (free - start) / (1 + 0.01 * 7.0)
    assert expected.norm() > 0
    torch.testing.assert_close(pulled - start, expected, rtol=1e-9, atol=1e-15)


def first_move(overrides: list[str]) -> tuple[Tensor, Tensor]:
    """A flat of the slow level after its first move, and its anchor."""
    run = tiny(*CONSTANT, *overrides)
    world, model, optimizer = built(run, torch.float64)
    for step in (1, 2):
        optimizer.step(step, model.forward_backward(usual(run, step, world), True)[2].long())
    (rule, _), *_ = held(optimizer.movers["slow"])
    return rule.master, rule.state["anchor"]


@pytest.mark.parametrize("rule", ["sgd", "adamw", "muon"])
def test_row_33_moves_stay_off_the_directions_of_earlier_tasks(rule: str) -> None:
    said = [LEVELS % ", project: 4", f"optim.name={rule}"]
    ((_, _, products),) = ranks(1, two_tasks, said)
    ((_, _, without),) = ranks(1, two_tasks, said, False)
    along, before = sum(products), sum(without)  # over the flats of the level
    assert along[:2].abs().max() < 1e-14 and before.abs().max() > 1e-8


LAYOUTS = {
    "data": (2, []),
    "tensor": (2, ["parallel.tensor=2"]),
    "pipeline-data": (4, ["parallel.pipeline=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_is_the_same_on_every_layout(layout: str) -> None:
    count, said = LAYOUTS[layout]
    overrides = [LEVELS % ", project: 3, anchor: 5.0", "optim.clip=0"]
    overrides += ["optim.name=sgd", "optim.matrix.momentum=0.5"]
    one, several = moved(overrides), moved(overrides, said, count)
    for name in one:
        tolerance = 1e-6 if layout == "tensor" else 1e-9
        assert (one[name] - several[name]).norm() <= tolerance * one[name].norm(), name


def forgetting(project: int, enough: float | None, seed: int) -> tuple[float, float, int]:
    """Loss on task A and on B, and steps, when B's loss first is `enough` (None: after 40 steps) after A was learned."""
    run = tiny(
        *CONSTANT,
        f"levels=[{{name: all, project: {project}}}]",
        "optim.name=sgd",
        "optim.matrix.momentum=0.9",
        "optim.lr=0.05",
        "optim.weight_decay=0",
        "model.layers=2",
        "train.micro_batch=8",
    )
    world, model, optimizer = built(run)
    tasks = [usual(run, place, world) for place in (seed, seed + 100)]

    def loss(task: int, learn: bool) -> float:
        total = model.forward_backward(tasks[task], learn)
        return float(total[0] / total[1])

    for step in range(1, 61):
        loss(0, True)
        optimizer.step(step, torch.tensor(128))
    optimizer.tasks.end(["all"])
    for step in range(61, 261):
        with torch.no_grad():
            now = loss(1, False)
        if (enough is None and step == 101) or (enough is not None and now <= enough):
            break
        loss(1, True)
        optimizer.step(step, torch.tensor(128))
    with torch.no_grad():
        return loss(0, False), now, step - 61


@pytest.mark.parametrize("seed", sampled([100, 300, 500, 700], [500, 700]))
def test_row_33_less_of_the_first_task_is_forgotten_at_the_same_loss_on_the_second(seed: int) -> None:
    """A stream of two tasks: momentum SGD, and the same with its moves kept off the first task's gradients."""
    first, second, _ = ranks(1, forgetting, 0, None, seed)[0]
    kept, reached, steps = ranks(1, forgetting, 32, second, seed)[0]
    assert reached <= second and steps < 200
    assert kept < first - 0.05, (first, kept, second, steps)


def importances(overrides: list[str], steps: int) -> list[tuple[str, bool, float, int]]:
    """By flat of the first level: its rule, whether nested, mean importance after a task, places that are filled."""
    run = tiny(*CONSTANT, *overrides)
    world, model, optimizer = built(run, torch.float64)
    for step in range(1, steps + 1):
        optimizer.step(step, model.forward_backward(usual(run, step, world), True)[2].long())
    mover = optimizer.movers["fast"]
    flats = [flat for shard in mover.shards for flat in shard.flats]
    filled = [
        sum(bool(rule.state[f"{DIRECTION}{i}"].any()) for i in range(mover.group.level.project))
        for rule, _ in held(mover)
    ]
    optimizer.tasks.end(["fast"])
    means = [float(torch.cat([r.state["importance"][s] for s in spans]).mean()) for r, spans in held(mover)]
    kinds = [(flat.kind.rule, flat.kind.nested) for flat in flats]
    return [(*kind, mean, places) for kind, mean, places in zip(kinds, means, filled, strict=True)]


KEEPS = "levels=[{name: fast, period: 1, width: 0.5, anchor: 1.0, project: 3}, {name: slow, period: 2, width: 0.5}]"


def test_importance_has_mean_one_among_the_leaves_that_have_moments() -> None:
    by_flat = ranks(1, importances, [KEEPS, "optim.name=muon"], 5)[0]
    assert {rule for rule, *_ in by_flat} == {"muon", "adamw"}
    assert all(mean == pytest.approx(1.0, rel=1e-9) for rule, _, mean, _ in by_flat if rule == "muon")
    assert all(mean > 1e-2 for _, _, mean, _ in by_flat)


def test_nested_levels_that_were_just_reset_are_anchored_and_gather_whole_gradients() -> None:
    by_flat = ranks(1, importances, [KEEPS, "model.variant=nested"], 8)[0]
    assert {nested for _, nested, *_ in by_flat} == {True, False}
    assert all(mean == 1.0 for _, nested, mean, _ in by_flat if nested)
    assert all(mean > 1e-2 and places == 3 for _, _, mean, places in by_flat)
