"""The formula of operations against the products that torch carries out."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from nlscale.config.run import Run
from nlscale.model.count import attention_flops, flops_a_token
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.sampled import sampled
from tests.tiny import micro_batches, tiny

SHAPE = ["model.layers=4", "model.width=64", "model.hidden=256", "data.sequence=64", "model.attention=causal"]
INSIDE = (
    "levels=[{name: quick, period: 8, unit: token, width: 0.5}, "
    "{name: calm, period: 16, unit: token, width: 0.25}, {name: slow, period: 2, width: 0.25}]"
)
OWN, OTHERS = (
    2 * 64 * 192,
    2 * 64 * 64,
)  # operations of one product with the units that learn inside rows, and the others


def carried_out(run: Run) -> float:
    """Operations of products, one token forward and backward; attention's own are not among those torch counts here."""
    model = parallelize(run, join(run.parallel, run.cluster, 0))
    batches = micro_batches(run, 0, 0, 1)
    with FlopCounterMode(display=False) as counter:
        model.forward_backward(batches, True)
    return counter.get_total_flops() / sum(batch[0].numel() for batch in batches)


def by_formula(run: Run, scored: int) -> float:
    """The same by formula, without attention of `scored` layers forward."""
    tokens = run.data.sequence
    return flops_a_token(run.model, run.levels, tokens) - scored * attention_flops(run.model, tokens)


def test_a_plain_step_is_counted_exactly() -> None:
    run = tiny(*SHAPE, "use.levels=plain")
    assert ranks(1, carried_out, run) == [by_formula(run, 3 * 4)]


@pytest.mark.parametrize(
    "changed", sampled(["activation=silu", "activation=swiglu", "query=true"], ["activation=silu", "query=true"])
)
def test_memories_and_their_writes_are_counted(changed: str) -> None:
    """But for solves and what lies in the operator around them; the last chunk of many writes nothing."""
    own = [f"model.self_modifying.{said}" for said in ("chunk=16", changed)]
    shape = ["model.layers=1", "model.width=64", "model.heads=1", "model.kv_heads=1", "data.sequence=256"]
    run = tiny(
        *shape,
        "use.levels=plain",
        "model.attention=causal",
        "model.mixer=self_modifying",
        *own,
    )
    assert ranks(1, carried_out, run)[0] == pytest.approx(by_formula(run, 0), rel=0.08)


def test_learning_inside_a_row_is_counted() -> None:
    """What is done beside the formula is known: copies are read by products of their own, forward and twice backward."""
    run = tiny(*SHAPE, INSIDE, "model.inner.layers=1", "model.inner.form=whole")
    (found,) = ranks(1, carried_out, run)
    apart = (1 - 8 / 64) * (2 * 3 * OWN + OWN + OTHERS)
    assert found == pytest.approx(by_formula(run, 3 * 4) + apart, rel=0.003)
    deeper = tiny(*SHAPE, INSIDE, "model.inner.layers=2")
    more = by_formula(deeper, 3 * 4) - by_formula(run, 3 * 4)
    assert 0 < more < ranks(1, carried_out, deeper)[0] - found


def test_frozen_levels_learn_nothing_inside_rows() -> None:
    still = tiny(*SHAPE, INSIDE.replace("unit: token", "unit: token, frozen: true"))
    plain = tiny(*SHAPE, "use.levels=plain")
    assert flops_a_token(still.model, still.levels, 64) == flops_a_token(plain.model, plain.levels, 64)
