"""Rows 1 to 9, 11, 14, 24 to 28, 34 and 35 of the README's table: learners are memories of one interface. float64."""

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.associative import (
    ADAM,
    DELTA,
    MOMENTUM,
    SGD,
    Associative,
    Context,
    Gates,
    State,
    adam_memory,
    delta_step,
    dot,
    follow_leader,
    generated,
    handed,
    hold,
    linear,
    mlp,
    momentum_memory,
    nearest,
    programmed,
    proximal,
    regression,
    scaled,
    signals,
    square,
    written_in_context,
)
from nlscale_kernels.linear_memory import Tokens, linear_memory, serial
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.titans import Tokens as Titans
from nlscale_kernels.titans import titans
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

O, I, T = 3, 4, 9


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def remember(memory: Associative, keys: Tensor, values: Tensor, gates: list[Gates], weight: Tensor) -> State:
    return memory.learn(memory.begin({"up": weight}), Context(keys, values), gates)


def slope(objective, at: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.autograd.grad(objective(at.requires_grad_()), at)[0]


def test_row_2_sgd_is_the_memory_of_its_surprise() -> None:
    """A step of SGD = writing (x, -u) by the dot objective = its proximal problem = follow the regularised leader."""
    weight, xs, targets, rate = numbers(O, I), numbers(T, I, seed=1), numbers(T, O, seed=2), 0.05
    layer = nn.Linear(I, O, bias=False).double()
    layer.weight.data.copy_(weight)
    memory, pairs = Associative(linear, dot, SGD), []
    state = memory.begin({"up": weight})
    for x, target in zip(xs, targets, strict=True):
        with signals(layer) as seen:
            functional = nn.Sequential(layer)
            (functional(x[None]) - target).square().sum().backward()
        assert layer.weight.grad is not None
        u = seen[""].u[0]  # type: ignore[index]
        assert_close(seen[""].gradient(), layer.weight.grad)
        now = layer.weight.detach().clone()
        assert_close(
            slope(lambda w: w @ x @ u + (w - now).square().sum() / (2 * rate), proximal(now, x, u, rate)),
            torch.zeros(O, I).double(),
        )
        layer.weight.data -= rate * layer.weight.grad
        layer.weight.grad = None
        pairs.append((x, u))
        state = memory.write(state, x, -u, Gates(rate))
        assert_close(state.weights["up"], layer.weight.detach())
    assert_close(follow_leader(weight, pairs, rate), layer.weight.detach())


@pytest.fixture(autouse=True)
def _initial_values_are_the_same() -> None:
    """Of layers whose weights torch draws: a gradient that happens to be near nothing has no precise difference."""
    torch.manual_seed(0)


def test_row_2_the_surprise_of_a_layer_by_finite_differences() -> None:
    network = nn.Sequential(nn.Linear(I, 5), nn.Tanh(), nn.Linear(5, O)).double()
    x, step = numbers(2, I, seed=1), 1e-6
    with signals(network) as seen:
        network(x).square().sum().backward()
    weight = network[0].weight
    for place in ((0, 0), (4, 3)):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
                losses.append(network(x).square().sum())
                weight[place] -= sign * step
        assert float((losses[0] - losses[1]) / (2 * step)) == pytest.approx(
            float(seen["0"].gradient()[place]), rel=1e-7
        )


def test_row_3_backpropagation_is_self_referential() -> None:
    """Errors of a layer come through the layers after it; replaying frozen ones is another algorithm after two steps."""
    network = nn.Sequential(nn.Linear(I, 5, bias=False), nn.Tanh(), nn.Linear(5, O, bias=False)).double()
    x, target, rate = numbers(6, I, seed=1), numbers(6, O, seed=2), 0.1

    def step(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = lambda w: 0.5 * (functional_call(network, w, (x,)) - target).square().sum()  # noqa: E731
        return {name: w - rate * g for (name, w), g in zip(weights.items(), grad(loss)(weights).values(), strict=True)}

    start = {name: w.detach().clone() for name, w in network.named_parameters()}
    with signals(network) as seen:
        (0.5 * (network(x) - target).square().sum()).backward()
    hidden = torch.tanh(x @ start["0.weight"].T)
    last = hidden @ start["2.weight"].T - target
    assert_close(seen["2"].u, last)  # type: ignore[arg-type]
    assert_close(seen["0"].u, (last @ start["2.weight"]) * (1 - hidden.square()))  # type: ignore[arg-type]
    once, frozen = step(start), start["0.weight"] - rate * seen["0"].gradient()
    assert_close(once["0.weight"], frozen)
    replayed, again = frozen - rate * seen["0"].gradient(), step(once)["0.weight"]
    assert (again - replayed).norm() > 1e-2 * (again - start["0.weight"]).norm()


def test_row_3_a_network_under_backpropagation_is_a_memory_for_each_layer() -> None:
    """Each layer's memory writes (its input, -its error): T steps of SGD on the whole network, rows side by side."""
    network = nn.Sequential(nn.Linear(I, 5, bias=False), nn.Tanh(), nn.Linear(5, O, bias=False)).double()
    optimizer, rate = torch.optim.SGD(network.parameters(), lr=0.1), Gates(0.1)
    memory = Associative(linear, dot, SGD)
    layers = {name: memory.begin({"up": network.get_parameter(f"{name}.weight").detach().clone()}) for name in "02"}
    for step in range(T):
        with signals(network) as seen:
            (network(numbers(6, I, seed=step)) - numbers(6, O, seed=99 + step)).square().sum().backward()
        for name, at in layers.items():  # all rows' gradients are taken where the step begins, as a chunk's are
            for x, u in zip(seen[name].x, seen[name].u, strict=True):  # type: ignore[arg-type]
                layers[name] = memory.write(layers[name], x, -u, rate, at)
        optimizer.step()
        optimizer.zero_grad()
        for name, state in layers.items():
            assert_close(state.weights["up"], network.get_parameter(f"{name}.weight").detach())


def test_row_4_momentum_is_two_memories() -> None:
    weight, share, rate = nn.Parameter(numbers(O, I)), 0.8, 0.1
    xs, us = numbers(T, I, seed=1), numbers(T, O, seed=2)
    theirs = torch.optim.SGD([weight], lr=1.0, momentum=share)
    memory = Associative(linear, dot, MOMENTUM)
    state, inner = memory.begin({"up": weight.detach().clone()}), torch.zeros(O, I).double()
    for x, u in zip(xs, us, strict=True):
        gradient = torch.outer(u, x)
        weight.grad = rate * gradient
        theirs.step()
        before, inner = inner, momentum_memory(inner, gradient, share, rate)
        assert_close(
            slope(lambda m: (m * gradient).sum() + (m - share * before).square().sum() / (2 * rate), inner.clone()),
            torch.zeros(O, I).double(),
        )
        state = memory.write(state, x, -u, Gates(rate, 1.0, share))
        assert_close(state.extra["up"], inner)
        assert_close(state.weights["up"], weight.detach())


def test_row_5_adam_is_the_best_elementwise_memory_where_its_betas_are_equal() -> None:
    gradients, beta = numbers(30, 7), 0.9
    w = (1 - beta) * beta ** torch.arange(29, -1, -1).double()[:, None]
    size = (w * gradients.square()).sum(0).sqrt()
    best = adam_memory(gradients, beta)
    assert_close(slope(lambda m: (w * (m * gradients - size).square()).sum(), best.clone()), torch.zeros(7).double())
    memory = Associative(scaled, square, ADAM)
    gates = [Gates(rate=1 - beta, keep=beta)] * 30
    state = memory.learn(memory.begin({"scale": torch.zeros(7).double()}), Context(gradients, gradients), gates)
    assert_close(memory.read(state, torch.ones(7).double()), best)
    fit = lambda m: sum(a * memory.objective(m * g, size) for a, g in zip(w, gradients, strict=True))  # noqa: E731
    assert_close(slope(fit, state.weights["scale"].clone()), torch.zeros(7).double())

    def adam(beta1: float, beta2: float) -> Tensor:
        weight = nn.Parameter(torch.zeros(7).double())
        optimizer = torch.optim.Adam([weight], lr=1.0, betas=(beta1, beta2), eps=0.0)
        for g in gradients:
            before, weight.grad = weight.detach().clone(), g
            optimizer.step()
        # torch's step undoes the EMAs' zero start; the objective knows no such start
        return (before - weight.detach()) * (1 - beta1**30) / (1 - beta2**30) ** 0.5

    assert_close(best, adam(beta, beta))
    assert (best - adam(beta, 0.99)).norm() > 1e-2 * best.norm()


def as_tokens(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, keep: Tensor) -> Tokens:
    return Tokens(q[None, None], k[None, None], v[None, None], rate[None, None], keep.log()[None, None])


def test_row_6_linear_attention_is_one_step_on_the_dot_objective() -> None:
    q, k, v = numbers(T, I, seed=1), numbers(T, I, seed=2), numbers(T, O, seed=3)
    one = torch.ones(T).double()
    state = remember(Associative(linear, dot, SGD), k, v, [Gates()] * T, torch.zeros(O, I).double())
    o, last = serial("linear", as_tokens(q, k, v, one, one), torch.zeros(1, O, I).double())
    assert torch.equal(last[0, 0], state.weights["up"])
    assert_close(o[0, 0], (q @ k.T).tril() @ v, 1e-13)


def test_row_7_the_delta_rule_is_one_step_on_the_square_objective() -> None:
    q, k, v = numbers(T, I, seed=1), F.normalize(numbers(T, I, seed=2), dim=-1), numbers(T, O, seed=3)
    rate, keep, start = torch.rand(T).double(), torch.ones(T).double(), numbers(O, I, seed=4)
    state = remember(Associative(linear, square, SGD), k, v, [Gates(r) for r in rate], start)
    _, last = linear_memory("delta", as_tokens(q, k, v, rate, keep), 3, start[None])
    assert_close(last[0, 0], state.weights["up"])


def test_row_8_softmax_attention_is_the_non_parametric_memory() -> None:
    query, keys, values = numbers(I), numbers(T, I, seed=1), numbers(T, O, seed=2)
    said = nearest(query, keys, values, I**-0.5)
    s = torch.exp(keys @ query * I**-0.5)
    assert_close(slope(lambda m: (s * (values - m).square().sum(-1)).sum(), said.clone()), torch.zeros(O).double())
    assert_close(said, F.scaled_dot_product_attention(query[None], keys, values)[0])
    empty = {"keys": torch.zeros(0, I).double(), "values": torch.zeros(0, O).double()}
    memory = Associative(regression(I**-0.5), square, hold())
    state = memory.learn(memory.begin(empty), Context(keys, values), [Gates()] * T)
    assert_close(memory.read(state, query), said)
    fit = lambda m: sum(a * memory.objective(m, v) for a, v in zip(s, values, strict=True))  # noqa: E731
    assert_close(slope(fit, memory.read(state, query)), torch.zeros(O).double())
    queries = numbers(T, I, seed=3)
    near = (torch.arange(T)[:, None] - torch.arange(T)).abs() < 4
    window = F.scaled_dot_product_attention(queries, keys, values, near.tril())
    memory = Associative(regression(I**-0.5), square, hold(4))
    state = memory.begin(empty)
    for t in range(T):  # window attention: the same sum, over the last tokens
        few = slice(max(0, t - 3), t + 1)
        assert_close(nearest(queries[t], keys[few], values[few], I**-0.5), window[t])
        state = memory.write(state, keys[t], values[t], Gates())
        assert_close(memory.read(state, queries[t]), window[t])


def test_row_9_a_weight_may_be_written_in_context() -> None:
    """y = y_attn W_t: with rate 0 it is the slow weight's product bit for bit, with W_0 = 0 linear attention on y_attn."""
    y, k, v = numbers(T, I, seed=1), numbers(T, I, seed=2), numbers(T, O, seed=3)
    slow, one, nothing = numbers(1, O, I, seed=4), torch.ones(T).double(), torch.zeros(1, O, I).double()
    off, _ = linear_memory("linear", as_tokens(y, k, v, 0 * one, one), T, slow)
    assert torch.equal(off, y[None, None] @ slow[None].mT)  # a product of the same shape: BLAS adds up by shape
    on, _ = linear_memory("linear", as_tokens(y, k, v, one, one), 3, nothing)
    assert_close(on[0, 0], (y @ k.T).tril() @ v)
    for rate in (0.0, 0.3):  # the block's readable form
        fast, _ = linear_memory("linear", as_tokens(y, k, v, rate * one, one), 3, slow)
        assert_close(written_in_context(y, k, v, slow[0], rate), fast[0, 0])
    assert_close(written_in_context(y, k, v, nothing[0], 1.0), on[0, 0])


def test_row_14_a_memorys_initial_state_is_learnt_through_its_writes() -> None:
    keys, values, query = numbers(4, I, seed=1), numbers(4, I, seed=2), numbers(I, seed=3)
    memory = Associative(mlp, square, MOMENTUM)

    def outer(up: Tensor, down: Tensor) -> Tensor:
        state = memory.begin({"up": up, "down": down})
        for key, value in zip(keys, values, strict=True):
            state = memory.write(state, key, value, Gates(0.3, 0.9, 0.5))
        return memory.read(state, query).square().sum()

    leaves = [(0.5 * numbers(5, I, seed=4)).requires_grad_(), (0.5 * numbers(I, 5, seed=5)).requires_grad_()]
    assert torch.autograd.gradcheck(outer, leaves)


def test_row_14_projections_learn_through_writes_alone() -> None:
    """Titans' ablation: where no gradient passes the writes, keys' and values' projections get none; queries' does."""
    x, start = numbers(T, I, seed=1), {"up": numbers(5, I, seed=4), "down": numbers(I, 5, seed=5)}
    memory = Associative(mlp, square, MOMENTUM)

    def outer(projections: tuple[Tensor, ...], stop: bool) -> Tensor:
        q, k, v = (x @ each.T for each in projections)
        state = memory.begin(start)
        total = torch.zeros((), dtype=x.dtype)
        for query, key, value in zip(q, k, v, strict=True):
            state = memory.write(state, key, value, Gates(0.3, 0.9, 0.5))
            total = total + memory.read(handed(state, not stop), query).square().sum()
        return total

    projections = tuple((0.5 * numbers(I, I, seed=s)).requires_grad_() for s in (6, 7, 8))
    q, k, v = torch.autograd.grad(outer(projections, True), projections, allow_unused=True)
    assert k is None and v is None and q.norm() > 0
    assert torch.autograd.gradcheck(lambda *each: outer(each, False), projections)
    assert all(each.norm() > 1e-3 for each in torch.autograd.grad(outer(projections, False), projections))


def sine_tasks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and y (count, 10, 1) of sines of random phase and height."""
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.rand(count, 10, 1, generator=generator, dtype=torch.float64) - 5
    height = 0.5 + 2 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64)
    return x, height * torch.sin(x + 3 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64))


def test_row_24_maml_is_two_levels() -> None:
    """An initial state learnt through one inner step from five points beats one learnt for the mean task."""
    network = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    torch.manual_seed(0)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    mean = lambda said, wanted: (said - wanted).square().mean()  # noqa: E731
    memory = Associative(lambda weights, x: functional_call(network, weights, (x,)), mean, SGD)

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mean(memory.read(memory.begin(weights), x), y)

    def adapted(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        state = memory.write(memory.begin(weights), x[:5], y[:5], Gates(0.03))  # five points, one write
        return mean(memory.read(state, x[5:]), y[5:])

    def train(objective) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        weights = {name: w.detach().clone().requires_grad_() for name, w in network.named_parameters()}
        optimizer = torch.optim.Adam(list(weights.values()), lr=3e-3)
        for step in range(400):
            x, y = sine_tasks(16, step)
            optimizer.zero_grad()
            vmap(objective, (None, 0, 0))(weights, x, y).mean().backward()
            optimizer.step()
        return weights

    x, y = sine_tasks(200, 10**6)
    with_meta, without = (float(vmap(adapted, (None, 0, 0))(train(f), x, y).mean()) for f in (adapted, loss))
    assert with_meta < 0.8 * without
    x, y = sine_tasks(1, 7)
    some = [w.detach().clone().requires_grad_() for w in network.parameters()]
    names = [name for name, _ in network.named_parameters()]
    objective = lambda *w: adapted(dict(zip(names, w, strict=True)), x[0], y[0])  # noqa: E731
    assert torch.autograd.gradcheck(objective, some, fast_mode=True)


def test_row_25_a_hypernetwork_makes_the_weights_of_another() -> None:
    """What the generated network says reaches the generator, and every weight is phi's product with the embedding."""
    z, query, shapes = numbers(3, seed=1), numbers(I, seed=2), {"up": (5, I), "down": (I, 5)}
    phi = {name: (0.5 * numbers(5 * I, 3, seed=s)).requires_grad_() for s, name in enumerate(shapes, 3)}
    made = generated(phi, z, shapes)
    for name, shape in shapes.items():
        assert_close(made[name], torch.einsum("fz,z->f", phi[name], z).reshape(shape))
    said = lambda up, down: mlp(generated({"up": up, "down": down}, z, shapes), query)  # noqa: E731
    assert torch.autograd.gradcheck(said, tuple(phi.values()))


def test_rows_25_and_26_a_generated_weight_of_rank_one_is_a_fast_weight_programmer() -> None:
    """theta_t = theta_{t-1} + v_t k_t^T with (k_t, v_t) generated from the token = linear attention."""
    x, q = numbers(T, I, seed=1), numbers(T, I, seed=2)
    phi, one = numbers(I + O, I, seed=3).requires_grad_(), torch.ones(T).double()
    k, v = (x @ phi.T).split([I, O], -1)
    fast = linear_memory("linear", as_tokens(q, k, v, one, one), 3, torch.zeros(1, O, I).double())[0][0, 0]
    assert_close(programmed(phi, x, q), fast)
    assert torch.autograd.gradcheck(lambda g: programmed(g, x, q), (phi,))


def test_row_25_what_generates_is_a_slower_level_than_what_it_generates() -> None:
    """The fast weight moves at every token and begins anew with every row; its generator moves once a row, and learns."""
    phi, teacher = 0.3 * numbers(I + O, I, seed=3), numbers(O, I, seed=4)
    lost = []
    for row in range(60):
        x = F.normalize(numbers(3 * I, I, seed=100 + row), dim=-1)
        said = programmed(phi.requires_grad_(), x, x, 0.3)
        loss = (said - x @ teacher.T)[-I:].square().mean()
        (slope,) = torch.autograd.grad(loss, phi)
        phi = (phi - 0.3 * slope).detach()
        lost.append(float(loss.detach()))
    assert sum(lost[-10:]) < 0.4 * sum(lost[:10])


def test_row_27_a_loop_of_linear_attention_is_gradient_descent_in_context() -> None:
    """n passes through one block of linear attention = n steps of least squares: what is left is equal [V18]."""
    keys, values, rate = numbers(12, I, seed=1), numbers(12, O, seed=2), torch.full((12,), 0.03, dtype=torch.float64)
    residual, weight, one = values, torch.zeros(O, I).double(), torch.ones(12).double()
    for _ in range(4):
        weight = weight + 0.03 * (values - keys @ weight.T).T @ keys
        tokens = as_tokens(keys, keys, residual, rate, one)
        _, said = linear_memory("linear", tokens, 4, torch.zeros(1, O, I).double())
        residual = residual - keys @ said[0, 0].T
        assert_close(residual, values - keys @ weight.T)


def test_row_28_titans_without_momentum_is_the_gated_delta_rule() -> None:
    """I14: a linear memory under the square objective."""
    q, k, v = numbers(T, I, seed=1), F.normalize(numbers(T, I, seed=2), dim=-1), numbers(T, O, seed=3)
    rate, keep, start = torch.rand(T).double(), 0.5 + 0.5 * torch.rand(T).double(), numbers(O, I, seed=4)
    gates = [Gates(r, a, 0.0) for r, a in zip(rate, keep, strict=True)]
    # keep W - rate (W k - v) k^T: the rate of the delta rule is that of Titans
    gated = remember(Associative(linear, square, MOMENTUM), k, v, gates, start)
    assert_close(linear_memory("delta", as_tokens(q, k, v, rate, keep), 3, start[None])[1][0, 0], gated.weights["up"])


@pytest.mark.parametrize("chunk", [1, 3])
def test_row_28_titans_without_momentum_or_forgetting_is_test_time_training(chunk: int) -> None:
    """torch's SGD on the memory's loss, a chunk's gradients taken at its begin (Sun et al., 2024)."""
    q, k, v = (numbers(T, I, seed=s) for s in (1, 2, 3))
    up, down, rate = 0.5 * numbers(5, I, seed=4), 0.5 * numbers(I, 5, seed=5), 0.2 * torch.rand(T).double()
    none = torch.zeros(1, 1, T).double()
    tokens = Titans(*(x[None, None] for x in (q, k, v, rate)), none - 2000.0, none)
    said, left = titans(tokens, chunk, Net(up[None, None, None], down[None, None, None]))
    weights, read = {"up": up.clone().requires_grad_(), "down": down.clone().requires_grad_()}, []
    for first in range(0, T, chunk):
        part = slice(first, first + chunk)
        read += [mlp(weights, query).detach() for query in q[part]]
        loss = sum(r * square(mlp(weights, a), b) for r, a, b in zip(rate[part], k[part], v[part], strict=True))
        optimizer = torch.optim.SGD(weights.values(), lr=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(said[0, 0], torch.stack(read))
    assert_close(left.net.up[0, 0, 0], weights["up"].detach())
    assert_close(left.net.down[0, 0, 0], weights["down"].detach())


def test_row_35_delta_gradient_descent_solves_its_proximal_problem_for_every_length() -> None:
    for length in (0.1, 1.0, 30.0):
        weight, x, u, rate = numbers(O, I), length * numbers(I, seed=1), numbers(O, seed=2), 0.7
        new = delta_step(weight, x, u, rate)
        assert_close(
            slope(lambda w: 0.5 * (w @ x + u).square().sum() + (w - weight).square().sum() / (2 * rate), new.clone()),
            torch.zeros(O, I).double(),
            1e-10,
        )


def test_delta_gradient_descent_on_a_matrix_memory_is_the_delta_rule_at_twice_the_rate() -> None:
    """W (a I - e k k^T) - e (W k - v) k^T = the delta rule with rate 2 e, value v / 2: repeated, M k is v / 2 [V10]."""
    k, v = F.normalize(numbers(1, I, seed=1), dim=-1), numbers(1, O, seed=2)
    memory = Associative(linear, square, DELTA)
    state = remember(memory, k.expand(200, I), v.expand(200, O), [Gates(0.2)] * 200, numbers(O, I, seed=3))
    assert_close(memory.read(state, k[0]), v[0] / 2, 1e-9)
    hebbian = Associative(linear, dot, DELTA)
    state = remember(hebbian, k.expand(200, I), v.expand(200, O), [Gates(0.2)] * 200, numbers(O, I, seed=3))
    assert_close(hebbian.read(state, k[0]), v[0], 1e-9)
    once = remember(memory, k, v, [Gates(0.2, 0.9)], numbers(O, I, seed=3))
    rule = as_tokens(k, k, v / 2, *torch.tensor([[0.4], [0.9]], dtype=torch.float64))
    assert_close(once.weights["up"], serial("delta", rule, numbers(1, O, I, seed=3))[1][0, 0])


def test_row_11_a_slower_block_may_read_a_faster_one_without_teaching_it() -> None:
    """Direct parametric conditioning: nothing reaches what wrote the fast state unless asked; asked, it is autograd's."""
    x, query = numbers(T, I, seed=1), numbers(I, seed=2)
    memory = Associative(linear, square, SGD)

    def read(writer: Tensor, slow: Tensor, taught: bool) -> Tensor:
        state = memory.begin({"up": torch.zeros(O, I).double()})
        for token in x:
            k, v = (writer @ token).split([I, O])
            state = memory.write(state, k, v, Gates(0.05))
        return memory.read(handed(state, taught), slow @ query).square().sum()

    writer, slow = (0.3 * numbers(I + O, I, seed=3)).requires_grad_(), numbers(I, I, seed=4).requires_grad_()
    still = torch.autograd.grad(read(writer, slow, False), (writer, slow), allow_unused=True)
    assert still[0] is None and still[1].norm() > 0
    assert torch.autograd.gradcheck(lambda w, s: read(w, s, True), (writer, slow))
    assert torch.autograd.grad(read(writer, slow, True), writer)[0].norm() > 0


def test_row_34_momentum_on_features_of_gradients() -> None:
    """Eq. 51 solves the momentum's proximal problem with f(g) for g; with the identity it is momentum."""
    momentum, gradient, share, rate = numbers(O, I), numbers(O, I, seed=1), 0.8, 0.1
    for feature in (torch.sign, lambda g: g + g**3, lambda g: g):
        found = momentum_memory(momentum, gradient, share, rate, feature)
        fit = lambda m, f=feature: (m * f(gradient)).sum() + (m - share * momentum).square().sum() / (2 * rate)  # noqa: E731
        assert_close(slope(fit, found.clone()), torch.zeros(O, I).double())
    assert_close(found, momentum_memory(momentum, gradient, share, rate))


def test_row_34_cubic_newton_schulz_is_gradient_descent_on_how_far_from_orthogonal() -> None:
    """O (3 I - O^T O) / 2 = O - 1/2 grad |O^T O - I|^2 / 4, and it converges to the polar factor [V8, A3]."""
    o = numbers(I, O) / numbers(I, O).norm()
    u, _, v = torch.linalg.svd(o, full_matrices=False)
    for _ in range(40):
        far = slope(lambda each: (each.T @ each - torch.eye(O).double()).square().sum() / 4, o.clone())
        stepped = o - 0.5 * far
        o = 1.5 * o - 0.5 * o @ o.T @ o
        assert_close(stepped, o)
    assert_close(o, u @ v)
