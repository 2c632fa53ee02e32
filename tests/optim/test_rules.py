"""Update rules against plain forms of their equations; on matrices that tensor parallelism cuts, and on sharded ones."""

import math

import pytest
import torch
import torch.distributed as dist
from nlscale_kernels.associative import deep_step
from nlscale_kernels.newton_schulz import QUINTIC
from torch import Tensor

from nlscale.config.cluster import Cluster
from nlscale.config.levels import Level
from nlscale.config.optim import MATRIX_RULES, RULES, Matrix, Optim
from nlscale.config.parallel import Parallel
from nlscale.optim.layout import Kind
from nlscale.optim.matrices import Part
from nlscale.optim.newton_schulz import gathers, newton_schulz
from nlscale.optim.rules import Rule, bind
from nlscale.optim.shard import parts
from nlscale.optim.split import Split
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.optim.driver import CONSTANT, LAYOUTS, built, run_steps
from tests.sampled import alone, sampled
from tests.tiny import tiny
from tests.whole import assemble

HYPER = Matrix(slow_period=2, eps=1e-3)
OPTIM = Optim(weight_decay=0.1, matrix=HYPER)


def polynomial(x: Tensor, iterations: int) -> Tensor:
    """Quintic Newton-Schulz through the singular values, which is what it does to a matrix (Jordan et al., 2024)."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s, (a, b, c) = s / (s.square().sum().sqrt() + 1e-7), QUINTIC
    for _ in range(iterations):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def reference(name: str, grads: list[Tensor], weight: Tensor) -> Tensor:
    """Equations of spec 2.10 written out for one matrix."""
    w, h, rate = weight.clone(), HYPER, 0.02
    m, v, slow, direction, window = (torch.zeros_like(w) for _ in range(5))
    scale = 0.2 * max(w.shape) ** 0.5
    for t, g in enumerate(grads, 1):
        if name == "sgd":
            m = h.momentum * m + g
            step = m
        elif name == "preconditioned":
            v = h.second * v + (1 - h.second) * g**2
            m = h.momentum * m + g / ((v / (1 - h.second**t)).sqrt() + h.eps)
            step = m * (1 - h.momentum)
        elif name == "muon":
            m = h.momentum * m + g
            step = scale * polynomial(m, 5)
        elif name == "m3":
            m = h.momentum * m + (1 - h.momentum) * g
            step, window = scale * (polynomial(m, 5) + h.slow_gain * direction), window + g
            if t % 2 == 0:
                slow = h.slow_momentum * slow + (1 - h.slow_momentum) * window / 2
                direction, window = polynomial(slow, 5), torch.zeros_like(w)
        elif name == "m3_paper":
            m, v, window = m + h.momentum * g, v + g**2, window + g
            step = (polynomial(m, 5) + h.slow_gain * direction) / (v.sqrt() + h.eps)
            if t % 2 == 0:
                slow = slow + h.slow_momentum * window
                direction, window = polynomial(slow, 5), torch.zeros_like(w)
        else:  # delta momentum
            unit = g / (g.square().sum().sqrt() + 1e-7)
            m = m @ (h.momentum * torch.eye(w.shape[1]) - h.delta * unit.T @ unit) + g
            step = m
        w = (1 - rate * 0.1) * w - rate * step
    return w


def rule(name: str, master: Tensor, matrices: list[Part], group: dist.ProcessGroup | None = None) -> Rule:
    return bind(Kind(name, True), master, OPTIM, Level(), matrices, group, {})


def random(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(6)]


@pytest.mark.parametrize("name", ["sgd", "preconditioned", "muon", "m3", "m3_paper", "delta_momentum"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_a_rule_is_its_equation(name: str, shape: tuple[int, int]) -> None:
    torch.set_default_dtype(torch.float64)
    weight, *grads = random(*shape)
    bound = rule(name, weight.flatten().clone(), [Part(0, shape, None)])
    for grad in grads:
        bound.step(grad.flatten(), 0.02)
    expected = reference(name, grads, weight)
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(bound.master.view(shape), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "size"), [("sgd", None), ("muon", 5)])
def test_row_34_momentum_whose_output_passes_a_map_is_sgd_or_muon(name: str, size: int | None) -> None:
    """Eq. 52 with the identity, and with Newton-Schulz (through the singular values here)."""
    weight, *grads = random(10, 6)
    optim = Optim(weight_decay=0.0, matrix=HYPER)
    bound = bind(Kind(name, True), weight.flatten().clone(), optim, Level(), [Part(0, (10, 6), None)], None, {})
    momentum, scale = torch.zeros_like(weight), 0.02 if size is None else 0.02 * 0.2 * 10**0.5
    for grad in grads:
        bound.step(grad.flatten(), 0.02)
        told = lambda m: scale * (m if size is None else polynomial(m, size))  # noqa: E731
        weight, momentum = deep_step(weight, momentum, grad, HYPER.momentum, 1.0, told)
    torch.testing.assert_close(bound.master.view(10, 6), weight, rtol=1e-10, atol=1e-10)


TOLD, LEARNT = 10, 0.01  # steps on the first task; loss on the second


def after_another_task(name: str, rate: float, seed: int) -> float:
    """Loss on the first task when the loss on the second has fallen to LEARNT, after TOLD steps on the first.

    Least squares whose inputs span two dimensions in each task, orthogonal to those of the other (eq. 45).
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    inputs = [basis[:, 2 * i : 2 * i + 2].T for i in range(2)]
    wanted = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in inputs]
    optim = Optim(weight_decay=0.0, matrix=Matrix(momentum=0.9))
    bound = bind(
        Kind(name, True), torch.zeros(24, dtype=torch.float64), optim, Level(), [Part(0, (3, 8), None)], None, {}
    )

    def loss(task: int) -> tuple[float, Tensor]:
        error = inputs[task] @ bound.master.view(3, 8).T - wanted[task]
        return float(error.square().sum() / 2), (error.T @ inputs[task]).flatten()

    for _ in range(TOLD):
        bound.step(loss(0)[1], rate)
    before = loss(0)[0], loss(1)[0]
    for _ in range(400):
        bound.step(loss(1)[1], rate)
        now = loss(0)[0], loss(1)[0]
        if now[1] <= LEARNT:  # to where the second task's loss passes, between two steps
            part = (before[1] - LEARNT) / (before[1] - now[1])
            return before[0] + part * (now[0] - before[0])
        before = now
    raise AssertionError("never learned")


@pytest.mark.parametrize("seed", range(4))
def test_row_33_delta_momentum_forgets_less_of_an_orthogonal_task(seed: int) -> None:
    """At the same loss on the second task: what the first one's gradients left in the momentum is erased sooner."""
    delta, plain = (after_another_task(name, 0.02, seed) for name in ("delta_momentum", "sgd"))
    assert delta < 0.7 * plain, (delta, plain)


def test_deep_momentum_is_gradient_descent_on_its_own_loss() -> None:
    _, *grads = random(8, 6)
    bound = rule("dmgd", torch.zeros(48, dtype=torch.float64), [Part(0, (8, 6), None)])
    bound.step(grads[0].flatten(), 0.02)
    network = bound.state["network"].view(8, 6).clone().requires_grad_()
    u = grads[1] / grads[1].square().mean().sqrt()
    loss = 0.5 * (torch.tanh(u @ network[:4].T) @ network[4:] - u).square().sum(1).mean()
    (slope,) = torch.autograd.grad(loss, network)
    expected = HYPER.momentum * network.detach() - HYPER.inner / 6 * slope
    bound.step(grads[1].flatten(), 0.02)
    torch.testing.assert_close(bound.state["network"].view(8, 6), expected, rtol=1e-6, atol=1e-8)


def test_deep_momentum_learns_what_gradients_have_in_common() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(16, 4, generator=generator, dtype=torch.float64) @ torch.randn(
        4, 12, generator=generator, dtype=torch.float64
    )
    optim = Optim(weight_decay=0.0, matrix=Matrix(momentum=1.0, inner=1.0))
    bound = bind(
        Kind("dmgd", True), torch.zeros(192, dtype=torch.float64), optim, Level(), [Part(0, (16, 12), None)], None, {}
    )
    unit = common / common.square().mean().sqrt()
    before = torch.zeros(16, 12, dtype=torch.float64)
    errors = []
    for _ in range(400):
        bound.step(common.flatten(), 1.0)
        errors.append(float((before - bound.master.view(16, 12) - unit).norm() / unit.norm()))
        before = bound.master.view(16, 12).clone()
    assert errors[-1] < 0.5 * errors[0]


def steps_to_the_minimum(name: str, rate: float, bend: float, limit: int = 200) -> int:
    """Steps from (-3.5, 2) until r^2 + (r - t + sin(bend r) / 2)^2 is 1e-3; `limit`: not within so many."""
    start = torch.tensor([-3.5, 2.0], dtype=torch.float64)
    bound = bind(
        Kind(name, True),
        start,
        Optim(weight_decay=0.0, matrix=Matrix(momentum=0.9)),
        Level(),
        [Part(0, (1, 2), None)],
        None,
        {},
    )
    for step in range(limit):
        r, t = bound.master.tolist()
        apart = r - t + 0.5 * math.sin(bend * r)
        if r * r + apart * apart <= 1e-3:
            return step
        if not abs(r) < 1e3:
            break
        slope = [2 * r + 2 * apart * (1 + 0.5 * bend * math.cos(bend * r)), -2 * apart]
        bound.step(torch.tensor(slope, dtype=torch.float64), rate)
    return limit


def test_row_34_delta_momentum_crosses_changing_curvature_sooner() -> None:
    """Eq. 53 with k = 1, alpha = 1/2, each rule at the best of its rates: sooner on the mean of 13 bends, not at each."""
    rates, bends = [10 ** (i / 4 - 3) for i in range(9)], [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8]
    sooner, later = (
        [min(steps_to_the_minimum(name, rate, bend) for rate in rates) for bend in bends]
        for name in ("delta_momentum", "sgd")
    )
    assert max(sooner + later) < 200 and sum(sooner) < 0.85 * sum(later)


def cut_equals_whole(name: str, shape: tuple[int, int], axis: int) -> float:
    """Largest difference between a cut matrix's rule on this rank and its part of the whole one's."""
    world = join(Parallel(tensor=dist_size()), Cluster(), 0)
    weight, *grads = random(*shape)
    whole = rule(name, weight.flatten().clone(), [Part(0, shape, None)])
    cut = weight.chunk(world.tensor.size(), axis)[world.tensor_rank].contiguous()
    local = (cut.shape[0], cut.shape[1])
    mine = rule(name, cut.flatten().clone(), [Part(0, local, axis)], world.tensor)
    for grad in grads:
        whole.step(grad.flatten(), 0.02)
        mine.step(grad.chunk(world.tensor.size(), axis)[world.tensor_rank].flatten(), 0.02)
    expected = whole.master.view(shape).chunk(world.tensor.size(), axis)[world.tensor_rank]
    return float((mine.master.view(local) - expected).abs().max())


def dist_size() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


@pytest.mark.parametrize("count", sampled([2, 4], [4]))
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", [name for name in MATRIX_RULES if name != "dgd"])  # that one: test_dgd.py
def test_a_cut_matrix_moves_like_the_whole_one(name: str, axis: int, count: int) -> None:
    for shape in ((8, 24), (24, 8)):
        assert max(ranks(count, cut_equals_whole, name, shape, axis)) < 1e-11, shape


def orthogonalised(shape: tuple[int, int], axis: int) -> tuple[bool, float]:
    """(whether whole matrices were handed around, difference from one rank's result) of three matrices."""
    world = join(Parallel(tensor=dist_size()), Cluster(), 0)
    x = torch.stack(random(*shape)[:3])
    split = Split(world.tensor, axis)
    mine = x.chunk(world.tensor.size(), axis + 1)[world.tensor_rank].contiguous()
    expected = torch.stack([polynomial(each, 5) for each in x]).chunk(world.tensor.size(), axis + 1)[world.tensor_rank]
    return gathers(split, mine, 5, 8), float((newton_schulz(mine, 5, split) - expected).abs().max())


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("shape", "axis", "way"), [((8, 64), 1, False), ((64, 8), 0, False), ((64, 8), 1, True), ((8, 64), 0, True)]
)
def test_i17_distributed_newton_schulz_is_local(shape: tuple[int, int], axis: int, way: bool, count: int) -> None:
    for gathered, difference in ranks(count, orthogonalised, shape, axis):
        assert gathered is way and difference < 1e-12


@pytest.mark.parametrize("rule_name", RULES[1:])
@pytest.mark.parametrize("layout", sampled(["data", "tensor-data", "pipeline-data"], ["data", "pipeline-data"]))
def test_a_rule_over_ranks_equals_one_process(rule_name: str, layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    common = [
        f"optim.name={rule_name}",
        "optim.matrix.slow_period=2",
        "optim.matrix.eps=0.01",
        *CONSTANT,
        "optim.lr=0.001",
    ]
    one = alone(tuple(common), 5, torch.float64)
    many = assemble(ranks(count, run_steps, [*common, *overrides], 5, torch.float64))
    limit = 1e-4 if "tensor" in layout else 1e-9  # megatron-core's vocabulary-parallel loss computes in float32
    for name, weight in one.items():
        assert (many[name] - weight).norm() <= limit * weight.norm(), name


def ownership(overrides: list[str]) -> list[tuple[str, str, bool]]:
    """(leaf, rule, whether this rank holds all of its local elements) of everything in this rank's part."""
    run = tiny(*overrides)
    world, _, optimizer = built(run)
    return [
        (leaf.name, flat.kind.rule, span.stop - span.start == leaf.value.numel())
        for mover in optimizer.movers.values()
        for shard in mover.shards
        for flat in shard.flats
        for leaf, _, span in parts(flat, world.copy, world.copies)
    ]


@pytest.mark.parametrize("layout", ["data", "data4", "tensor-data"])
def test_matrix_rules_get_the_matrices_whole_under_sharding(layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    held = [ownership for rank in ranks(count, ownership, [*overrides, "optim.name=muon"]) for ownership in rank]
    matrices = [(name, whole) for name, rule_name, whole in held if rule_name == "muon"]
    assert matrices and all(whole for _, whole in matrices)
    times = count // 2 if "tensor" in layout else 1  # each tensor-parallel rank has its own cut
    names = [name for name, _ in matrices]
    assert {names.count(name) for name in names} == {times}
    expected = {"q", "k", "v", "out", "gate", "up", "down"}
    assert {name.split(".")[-2] for name in names} == expected
    assert {name.split(".")[-2] for name, rule_name, _ in held if rule_name == "adamw"} == {"norm", "embed", "head"}
