"""Delta Gradient Descent against its proximal problem, and on cut, sharded and resumed layers."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nlscale.optim.dgd import delta_step
from nlscale.optim.matrices import Part
from nlscale.runtime.leaf import Leaf
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.optim.driver import CONSTANT, run_steps
from tests.records import losses, shards
from tests.sampled import alone, sampled
from tests.whole import assemble

DGD = ["optim.name=dgd", *CONSTANT, "optim.lr=0.02", "optim.clip=0"]


def moved(weight: torch.Tensor, grad: torch.Tensor, gram: torch.Tensor, rate: float, meets: int) -> torch.Tensor:
    master = weight.clone()
    leaf = Leaf("w", nn.Parameter(master), meets=meets)
    step = delta_step(master.view(-1), 0.0, [Part(0, tuple(weight.shape), None, leaf)], None, {"w": gram})
    step(grad.reshape(-1), rate, 1.0, 1)
    return master


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("meets", [0, 1])
def test_a_step_solves_its_proximal_problem(count: int, meets: int) -> None:
    """argmin_W 1/2n sum |W x - u|^2 + |W - W_t|^2 / (2 lr), by autograd's stationarity."""
    generator = torch.Generator().manual_seed(count)
    w, x, u = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 6), (count, 6), (count, 4)))
    grad, gram, rate = -u.T @ x / count, x.T @ x / count, 0.7
    new = moved(w, grad, gram, rate, 1) if meets else moved(w.T.contiguous(), grad.T.contiguous(), gram, rate, 0).T
    new = new.clone().requires_grad_()
    objective = 0.5 * (x @ new.T - u).square().sum() / count + (new - w).square().sum() / (2 * rate)
    (slope,) = torch.autograd.grad(objective, new)
    assert slope.abs().max() < 1e-12


def test_one_input_gives_the_papers_coefficient() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x, u = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 6), (6,), (4,)))
    rate = 3.0
    a = rate / (1 + rate * x @ x)
    expected = w @ (torch.eye(6, dtype=torch.float64) - a * torch.outer(x, x)) + a * torch.outer(u, x)
    found = moved(w, -torch.outer(u, x), torch.outer(x, x), rate, 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


LAYOUTS = {
    "data": (2, []),
    "tensor-data": (4, ["parallel.tensor=2"]),
    "tensor-sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "eager": (2, ["optim.reduce=eager"]),
    "recompute": (1, ["train.recompute=block"]),
}


VARIED = [*((layout, "independent") for layout in LAYOUTS), ("tensor-data", "sequential")]
KEPT = [("tensor-sequence", "independent"), ("pipeline", "independent"), ("eager", "independent")]


@pytest.mark.parametrize(("layout", "variant"), sampled(VARIED, [each for each in VARIED if each not in KEPT]))
def test_the_delta_rule_over_ranks_equals_one_process(layout: str, variant: str) -> None:
    count, overrides = LAYOUTS[layout]
    common = [*DGD, f"model.variant={variant}"]
    one = alone(tuple(common), 5, torch.float64)
    many = assemble(ranks(count, run_steps, [*common, *overrides], 5, torch.float64))
    limit = 1e-5 if "tensor" in layout else 1e-11  # megatron-core's vocabulary-parallel loss computes in float32
    for name, weight in one.items():
        assert (many[name] - weight).norm() <= limit * weight.norm(), name
    plain = alone((*common, "optim.name=sgd", "optim.matrix.momentum=0"), 5, torch.float64)
    weight = "blocks.0.mix.q.weight"
    assert one[weight].norm() < plain[weight].norm()  # it forgets


def test_open_products_survive_a_stop(prepared: str, tmp_path: Path) -> None:
    unbroken = small_run(prepared, tmp_path / "unbroken", "optim.name=dgd")
    ranks(2, train, unbroken)
    ranks(2, train, small_run(prepared, tmp_path / "resumed", "optim.name=dgd", "train.stop_at=15"))
    resumed = small_run(prepared, tmp_path / "resumed", "optim.name=dgd")
    ranks(2, train, resumed)
    assert losses(resumed) == losses(unbroken) and shards(resumed, resumed.train.steps) == shards(
        unbroken, resumed.train.steps
    )
    sequence = ["parallel.tensor=2", "parallel.sequence=true"]
    ranks(2, train, small_run(prepared, tmp_path / "moved", "optim.name=dgd", *sequence, "train.stop_at=15"))
    elsewhere = small_run(prepared, tmp_path / "moved", "optim.name=dgd", "optim.reduce=eager")
    ranks(2, train, elsewhere)
    assert losses(elsewhere) == pytest.approx(losses(unbroken), rel=2e-4)
