"""The registry: which parameter belongs to which level, who moves when, and what a config may not say."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from nlscale.config.errors import UserError
from nlscale.config.levels import Level, due, level_of, parameter_names
from nlscale.config.nesting import Learner, belongs, learners, nesting, registry
from nlscale.config.optim import MATRIX_RULES, STATES, Optim
from nlscale.model.count import parameters
from nlscale.optim.layout import Kind, slots
from nlscale.optim.levels import Group, groups, phase_of
from nlscale.optim.rules import ELEMENTS, bind
from nlscale.runtime.leaf import Leaf
from nlscale.testing import ranks
from tests.optim.driver import built, usual
from tests.tiny import tiny

TWO = "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 4, width: 0.5}%s]"


def test_the_nesting_of_adam_attention_and_a_continuum_is_the_papers() -> None:
    assert nesting(learners(tiny(TWO % ""))) == [
        {"attention"},  # every token
        {"fast.window", "slow.window"},  # every step
        {"fast.exp_avg", "fast.exp_avg_sq"},  # every step, and the weights need them
        {"fast.weight"},
        {"slow.exp_avg", "slow.exp_avg_sq"},  # every fourth step
        {"slow.weight"},
    ]


def test_row_27_a_loop_is_a_level_of_the_nesting() -> None:
    """A token passes the blocks again with what attention says by then: as often as attention, and after it."""
    assert nesting(learners(tiny(TWO % "", "model.loops=3")))[:3] == [
        {"attention"},
        {"loop"},
        {"fast.window", "slow.window"},
    ]
    chunks = nesting(learners(tiny(TWO % "", "model.loops=3", "model.mixer=titans", "model.titans.chunk=4")))
    assert chunks[:2] == [{"loop"}, {"memory"}]  # a memory that moves once a chunk is slower than a token's passes


def test_the_order_is_by_frequency_then_by_need() -> None:
    chain = [
        Learner("c", Fraction(1), frozenset({"b"})),
        Learner("slow", Fraction(1, 2), frozenset({"c"})),
        Learner("a", Fraction(1)),
        Learner("b", Fraction(1), frozenset({"a"})),
        Learner("token", math.inf),
        Learner("a2", Fraction(1)),
    ]
    assert nesting(chain) == [{"token"}, {"a", "a2"}, {"b"}, {"c"}, {"slow"}]


def test_the_rules_remember_what_the_registry_says() -> None:
    for name in ELEMENTS.keys() | set(MATRIX_RULES):
        rule = bind(Kind(name, True), torch.zeros(4), Optim(), Level(), [], None, {})
        assert tuple(rule.state) == STATES[name], name


def everything(overrides: list[str]) -> list[tuple[list[str], dict, dict]]:
    run = tiny(*overrides)
    _, model, optimizer = built(run)
    held = {name: sum(leaf.value.numel() for leaf in mover.leaves) for name, mover in optimizer.movers.items()}
    names = [leaf.name for mover in optimizer.movers.values() for leaf in mover.leaves]
    assert sorted(names) == sorted(leaf.name for leaf in model.leaves)  # each in one group
    return sorted(names), held, parameters(run.model, run.levels)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.variant=sequential"],
        ["model.variant=nested", "model.activation=gelu"],
        ["model.tied=true", "model.gains=true"],
        [TWO % ", {name: late, period: 8, width: 0, match: ['blocks.3.mix.*']}"],
    ],
)
def test_the_login_node_knows_the_models_parameters(overrides: list[str]) -> None:
    run = tiny(*overrides)
    ((names, held, by_formula),) = ranks(1, everything, overrides)
    assert names == sorted(parameter_names(run.model, run.levels))
    assert held == by_formula


def test_a_match_moves_parameters_to_its_level() -> None:
    run = tiny(TWO % ", {name: late, period: 8, width: 0, match: ['blocks.3.mix.*', head.weight]}")
    levels = run.levels
    table = {
        "blocks.3.mix.q.weight": "late",
        "blocks.2.mix.q.weight": "fast",
        "head.weight": "late",
        "embed.weight": "fast",
        "blocks.3.continuum.slow.up.weight": "slow",
        "blocks.0.continuum.gains": "late",
    }
    assert {name: level_of(name, levels).name for name in table} == table
    assert belongs("moments.first/blocks.3.mix.q.weight", run) == ("late", 8, "step")
    assert belongs("windows/1/0/blocks.3.continuum.slow.up.weight", run) == ("slow.window", 1, "step")
    assert belongs("windows/1/0/blocks.3.mix.q.weight.gram_cut", run) == ("late.window", 1, "step")
    assert belongs("state.slow_momentum/blocks.3.mix.q.weight", run) == ("late.slow_momentum", 8 * 16, "step")
    nested = tiny(TWO % "", "model.variant=nested")
    assert belongs("state.slow/blocks.0.continuum.fast.up.weight", nested) == ("fast.slow", 4, "step")
    frozen = tiny(TWO % ", {name: late, period: 8, width: 0, match: [head.weight], frozen: true}")
    assert belongs("weights/head.weight", frozen) == ("late", 0, "step")
    parts = {f"windows/{part}/0/head.weight": 8 for part in range(3)}
    assert registry(parts, run) == {
        "late.window": {"period": 1, "unit": "step", "bytes": 24, "tensors": ["windows/head.weight"]}
    }


def test_phases_are_a_pure_function_of_layer_and_step() -> None:
    levels = [Level(name="fast", width=0.5), Level(name="slow", period=4, width=0.5)]
    names = [group.name for group in groups(levels, 8, True)]
    assert names == ["fast", "slow", "slow+1", "slow+2", "slow+3"]
    assert [phase_of(f"blocks.{j}.mix.q.weight", levels[1], 8) for j in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert phase_of("head.weight", levels[1], 8) == 0
    moving = {step: [g.name for g in groups(levels, 8, True) if due(g.level, step, g.phase)] for step in (1, 2, 3, 4)}
    assert moving == {k: ["fast", f"slow+{4 - k}" if k < 4 else "slow"] for k in (1, 2, 3, 4)}
    assert not due(Level(period=2, frozen=True), 4) and Group(levels[1], 0).name == "slow"


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ("[{name: a, width: 1, period: 0}]", "period=0 must be at least 1"),
        ("[{name: memory, width: 1}]", "cannot be called memory"),
        ("[{name: a, width: 1, period: -4}]", "period=-4 must be at least 1"),
        (
            "[{name: a, width: 0.5}, {name: b, width: 0.5, period: 3}, {name: c, width: 0, period: 4}]",
            "3 or 6 would work",
        ),
        (
            "[{name: a, width: 0, unit: token}, {name: b, width: 1}]",
            "unit=token moves feed-forward units inside a sequence",
        ),
        ("[{name: a, width: 1}, {name: b, width: 0}]", r"b matches no parameter. Matched: a: \d+ .*; b: none"),
        ("[{name: a, width: 1}, {name: b, width: 0, match: [blocks.9.*]}]", r"'blocks.9.\*' matches no parameter"),
        (
            "[{name: a, width: 1}, {name: b, width: 0, match: [head.*]}, {name: c, width: 0, match: ['*.weight']}]",
            "'embed.weight|'head.weight' is matched by b and c",
        ),
        ("[{name: a, width: 1, optimizer: adam}]", "adam is no rule; choose one of adamw"),
    ],
)
def test_levels_that_cannot_be_are_refused(levels: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny(f"levels={levels}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.variant=nested", "optim.phase=staggered"], "nested needs optim.phase=aligned"),
        (["optim.name=muon", "optim.offload=4"], "updates level long in host memory, where muon has no fast"),
        (["optim.name=sgd", "optim.time_scaled_betas=true"], "level fast follows sgd"),
        (["model.variant=sequential", "model.gains=true"], "sequential chains its levels"),
        (["levels=[{name: a, width: 1, frozen: true}]"], "all are frozen"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny(*overrides)


def test_matrices_that_cannot_be_shared_out_are_refused() -> None:
    leaves = [Leaf(f"w{k}", nn.Parameter(torch.empty(8, 8, device="meta"))) for k in range(12)]
    assert slots(Kind("muon", True), leaves, 12, 2).elements == 12 * 64
    assert slots(Kind("muon", True), leaves, 16, 2).elements == 16 * 64
    with pytest.raises(UserError, match="12 matrices cannot be shared out evenly over 64 replicas .5.3 x their memory"):
        slots(Kind("muon", True), leaves, 64, 2)


def test_owners_hold_whole_matrices_and_equal_loads() -> None:
    shapes = [(6, 4)] * 5 + [(4, 4)] * 6 + [(2, 4)] * 7
    leaves = [Leaf(f"w{k}", nn.Parameter(torch.empty(shape, device="meta"))) for k, shape in enumerate(shapes)]
    flat = slots(Kind("muon", True), leaves, 4, 2)
    runs = [list(flat.runs(k * flat.elements // 4, (k + 1) * flat.elements // 4)) for k in range(4)]
    assert sorted(leaf.name for run in runs for leaf, _, _ in run) == sorted(leaf.name for leaf in leaves)
    assert all(start == 0 and span.stop - span.start == leaf.value.numel() for run in runs for leaf, start, span in run)
    loads = [sum(leaf.value.numel() for leaf, _, _ in run) for run in runs]
    assert max(loads) - min(loads) <= 24


def moves_of_frozen(overrides: list[str]) -> bool:
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    before = {leaf.name: leaf.value.clone() for leaf in model.leaves}
    for step in range(1, 5):
        optimizer.step(step, model.forward_backward(usual(run, step, world), True)[2].long())
    optimizer.flush(4)
    changed = {leaf.name for leaf in model.leaves if not torch.equal(before[leaf.name], leaf.value)}
    return changed == {name for name in before if level_of(name, run.levels).name == "fast"}


TRUNK = (
    "levels=[{name: fast, period: 1, width: 0.5, match: [head.weight]}, {name: trunk, period: 1, width: 0.5, frozen: true, "
    "match: [embed.weight, norm.weight, 'blocks.*.mix.*', 'blocks.*.continuum.norm.weight']}]"
)


def test_row_32_a_frozen_trunk_is_as_it_was_while_the_rest_moves() -> None:
    """Everything but the head and half of each continuum, matched by name."""
    assert all(ranks(2, moves_of_frozen, [TRUNK]))


@pytest.mark.parametrize("policy", ["defer", "eager"])
def test_a_frozen_level_never_moves(policy: str) -> None:
    levels = "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 2, width: 0.5, frozen: true}]"
    assert all(ranks(2, moves_of_frozen, [levels, f"optim.reduce={policy}"]))
