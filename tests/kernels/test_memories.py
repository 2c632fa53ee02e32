"""Sequence memories by chunks against the same token by token, in float64; hand-over, resets, causality, gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.linear_memory import Affine, affine, compose, linear_memory, matrix_memory, serial
from nlscale_kernels.linear_memory import Tokens as Pairs
from nlscale_kernels.linear_memory.memory import prepared
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.self_modifying import Gates, Memories, State, Still, self_modifying, walk
from nlscale_kernels.self_modifying import Tokens as Inputs
from nlscale_kernels.titans import Memory, titans
from nlscale_kernels.titans import Tokens as Surprises
from torch import Tensor

from tests.kernels.oracles import Five, of, titans_row

B, H, T, K, M = 2, 2, 24, 4, 5
STARTS = torch.zeros(B, T, dtype=torch.bool)
STARTS[0, [0, 3, 13]] = STARTS[1, [11, 12, 23]] = True
BIASES = (-0.5, 2.0, 0.8)  # rate, keep, the largest rate


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pairs(starts: Tensor | None = STARTS, tokens: int = T) -> Pairs:
    q, k, v = (numbers(B, H, tokens, K, seed=s) for s in range(3))
    rate, keep = torch.sigmoid(numbers(B, H, tokens, seed=3)), F.logsigmoid(numbers(B, H, tokens, seed=4) + 1)
    return Pairs(q, F.normalize(k, dim=-1), v, rate, keep, starts)


def net(count: int, out: int = K, seed: int = 0) -> Net:
    return Net(0.3 * numbers(1, H, count, M, K, seed=seed), 0.3 * numbers(1, H, count, out, M, seed=seed + 1))


def surprises(starts: Tensor | None = STARTS) -> Surprises:
    q, k, v, rate, _, _ = pairs()
    momentum, keep = F.logsigmoid(numbers(B, H, T, seed=5)), F.logsigmoid(numbers(B, H, T, seed=6) + 2)
    return Surprises(q, k, v, rate, momentum, keep, starts)


def inputs(starts: Tensor | None = STARTS, momentum: bool = False) -> Inputs:
    x, q = numbers(B, H, T, K, seed=7), numbers(B, H, T, K, seed=8)
    return Inputs(x, q, F.logsigmoid(numbers(B, H, T, seed=9)) if momentum else None, starts)


FIVE = Memories(net(2, seed=20), net(2, 1, 30), net(1, seed=40))
GATES = Gates(torch.full((H,), BIASES[0]).double(), torch.full((H,), BIASES[1]).double(), BIASES[2])


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
@pytest.mark.parametrize("chunk", [1, 6, 24])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_matrix_memory_by_chunks_is_the_recurrence(rule: str, chunk: int, starts: Tensor | None) -> None:
    initial, tokens = numbers(H, K, K), pairs(starts)
    o, state = linear_memory(rule, tokens, chunk, initial)
    expected, last = serial(rule, tokens, initial)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_runs_of_tokens_compose_as_affine_maps(rule: str, starts: Tensor | None) -> None:
    initial, state, tokens = numbers(H, K, K), numbers(B, H, K, K), pairs(starts)
    runs: list[Affine] = []
    for first in range(0, T, 8):
        part = Pairs(
            *(x[:, :, first : first + 8] for x in tokens[:5]), None if starts is None else starts[:, first : first + 8]
        )
        runs.append(affine(rule, part, 4, initial))
    whole = compose(compose(runs[0], runs[1]), runs[2])
    _, last = serial(rule, tokens, initial, state)
    torch.testing.assert_close(state @ whole.kept + whole.added, last, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
@pytest.mark.parametrize("chunk", [1, 4, 12, 5, 40])
def test_i15_titans_by_chunks_is_the_recurrence_with_stale_anchors(chunk: int, starts: Tensor | None) -> None:
    tokens, initial = surprises(starts), net(1)
    o, _ = titans(tokens, chunk, initial)
    marks = torch.zeros_like(STARTS) if starts is None else starts
    gates = torch.stack([tokens.rate, tokens.log_momentum.exp(), tokens.log_keep.exp()])
    for b in range(B):
        for h in range(H):
            row = titans_row(
                initial, h, tokens.q[b, h], tokens.k[b, h], tokens.v[b, h], gates[:, b, h], marks[b], chunk
            )
            torch.testing.assert_close(o[b, h], row, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("chunks", [(1, 1), (4, 4), (12, 12), (8, 2), (12, 4), (5, 5), (10, 5), (32, 4)])
def test_i13_self_modifying_by_chunks_is_the_recurrence(
    chunks: tuple[int, int], momentum: bool, starts: Tensor | None
) -> None:
    tokens = inputs(starts, momentum)
    o, _ = self_modifying(tokens, chunks, FIVE, GATES)
    marks = torch.zeros_like(STARTS) if starts is None else starts
    for b in range(B):
        for h in range(H):
            share = None if tokens.log_momentum is None else tokens.log_momentum[b, h].exp()
            row = Five(FIVE, h, BIASES).row(tokens.x[b, h], tokens.q[b, h], marks[b], chunks, share)
            torch.testing.assert_close(o[b, h], row, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_memories_of_other_units_are_the_recurrence(activation: str) -> None:
    wide = (2 if activation == "swiglu" else 1) * M

    def other(count: int, out: int, seed: int) -> Net:
        return Net(0.3 * numbers(1, H, count, wide, K, seed=seed), 0.3 * numbers(1, H, count, out, M, seed=seed + 1))

    tokens, five = inputs(STARTS, True), Memories(other(2, K, 20), other(2, 1, 30), other(1, K, 40))
    o, _ = self_modifying(tokens, (8, 4), five, GATES._replace(activation=activation))
    taught, initial = surprises(STARTS), other(1, K, 50)
    said, _ = titans(taught, 4, initial, activation=activation)
    gates = torch.stack([taught.rate, taught.log_momentum.exp(), taught.log_keep.exp()])
    for b in range(B):
        share = tokens.log_momentum[b, 1].exp()  # type: ignore[index]
        row = Five(five, 1, BIASES, activation=activation).row(tokens.x[b, 1], tokens.q[b, 1], STARTS[b], (8, 4), share)
        torch.testing.assert_close(o[b, 1], row, rtol=1e-10, atol=1e-12)
        q, k, v = (part[b, 1] for part in (taught.q, taught.k, taught.v))
        row = titans_row(initial, 1, q, k, v, gates[:, b, 1], STARTS[b], 4, of(activation))
        torch.testing.assert_close(said[b, 1], row, rtol=1e-10, atol=1e-12)


def net_of_three() -> Net:
    return Net(0.3 * numbers(1, H, 3, M, K, seed=60), 0.3 * numbers(1, H, 3, K, M, seed=61))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("still", [None, torch.tensor([False, False, True])], ids=["written", "unwritten"])
def test_queries_of_a_memory_are_the_recurrence(still: Tensor | None, recompute: bool) -> None:
    tokens, six = inputs(STARTS, True), FIVE._replace(vectors=net_of_three())
    gates = GATES._replace(still=Still(vectors=still))
    leaves = [x.requires_grad_() for x in six.vectors]
    o, state = self_modifying(tokens, (8, 4), six, gates, recompute=recompute)
    for b in range(B):
        share = tokens.log_momentum[b, 1].exp()  # type: ignore[index]
        said = {} if still is None else {"still": "query"}
        nowhere = torch.full_like(tokens.q[b, 1], torch.nan)
        row = Five(six, 1, BIASES, **said).row(tokens.x[b, 1], nowhere, STARTS[b], (8, 4), share)
        torch.testing.assert_close(o[b, 1], row, rtol=1e-10, atol=1e-12)
    assert all(slope[:, :, 2].abs().min() > 0 for slope in torch.autograd.grad(o.square().sum(), leaves))
    assert state is not None and state.memories.vectors.up.shape[2] == 3


LEFT_OUT = {
    "erase": (GATES._replace(erase=0.0), {"erase": False}),
    "unit values": (GATES._replace(unit_values=False), {"unit_values": False}),
    "clip": (GATES._replace(clip=0.3), {"clip": 0.3}),
    "per layer": (GATES._replace(per_layer=True), {"per_layer": True}),
    "per layer, clip": (GATES._replace(per_layer=True, clip=0.3), {"per_layer": True, "clip": 0.3}),
    "key": (GATES._replace(still=Still(vectors=torch.tensor([True, False]))), {"still": "key"}),
    "value": (GATES._replace(still=Still(vectors=torch.tensor([False, True]))), {"still": "value"}),
    "keep": (GATES._replace(still=Still(gates=torch.tensor([False, True]))), {"still": "keep"}),
    "main": (GATES._replace(still=Still(main=True)), {"still": "main"}),
}


@pytest.mark.parametrize("part", LEFT_OUT)
def test_row_22_what_is_left_out_of_the_rule_is_left_out_of_the_recurrence(part: str) -> None:
    gates, said = LEFT_OUT[part]
    tokens = inputs(STARTS, True)
    o, _ = self_modifying(tokens, (8, 4), FIVE, gates)
    whole, _ = self_modifying(tokens, (8, 4), FIVE, GATES)
    assert (o - whole).abs().max() > 1e-6
    for b in range(B):
        share = tokens.log_momentum[b, 1].exp()  # type: ignore[index]
        row = Five(FIVE, 1, BIASES, **said).row(tokens.x[b, 1], tokens.q[b, 1], STARTS[b], (8, 4), share)  # type: ignore[arg-type]
        torch.testing.assert_close(o[b, 1], row, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu"])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_erasing_on_both_layers_has_the_gradients_of_the_recurrence(momentum: bool, activation: str) -> None:
    """Of the initial states, which every write goes through; computed again in backward, too."""
    wide = (2 if activation == "swiglu" else 1) * M
    tokens, gates = inputs(STARTS, momentum), GATES._replace(per_layer=True, activation=activation)
    shapes = [(2, wide, K), (2, K, M), (2, wide, K), (2, 1, M), (1, wide, K), (1, K, M)]
    leaves = [(0.3 * numbers(1, H, *shape, seed=i)).requires_grad_() for i, shape in enumerate(shapes)]
    five = Memories(*(Net(*pair) for pair in zip(leaves[::2], leaves[1::2], strict=True)))
    slopes = []
    for recompute in (False, True):
        o, _ = self_modifying(tokens, (8, 4), five, gates, recompute=recompute)
        slopes.append(torch.autograd.grad(o.square().sum(), leaves))
    rows = []
    for b in range(B):
        for h in range(H):
            share = None if tokens.log_momentum is None else tokens.log_momentum[b, h].exp()
            one = Five(five, h, BIASES, activation=activation, per_layer=True, taught=True)
            rows.append(one.row(tokens.x[b, h], tokens.q[b, h], STARTS[b], (8, 4), share))
    exact = torch.autograd.grad(torch.stack(rows).square().sum(), leaves)
    for again, once, wanted in zip(*slopes, exact, strict=True):
        torch.testing.assert_close(once, wanted, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(again, once, rtol=1e-12, atol=1e-14)


def test_i14_without_momentum_the_gated_delta_rule_as_published() -> None:
    """S <- a S, then S <- S + b (v - S k) k^T (Yang et al., 2024): here with rate a b and values v / a."""
    tokens, state = pairs(None), torch.zeros(B, H, K, K, dtype=torch.float64)
    outputs = []
    for t in range(T):
        q, k, v = (part[:, :, t] for part in (tokens.q, tokens.k, tokens.v))
        state = tokens.log_keep[:, :, t, None, None].exp() * state
        missed = v - (state @ k.unsqueeze(-1)).squeeze(-1)
        state = state + tokens.rate[:, :, t, None, None] * missed.unsqueeze(-1) * k.unsqueeze(-2)
        outputs.append((state @ q.unsqueeze(-1)).squeeze(-1))
    share = tokens.log_keep.exp()
    ours = tokens._replace(rate=tokens.rate * share, v=tokens.v / share.unsqueeze(-1))
    o, last = linear_memory("delta", ours, 6, torch.zeros(H, K, K, dtype=torch.float64))
    torch.testing.assert_close(o, torch.stack(outputs, 2), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-10, atol=1e-12)


def test_i13_in_single_precision() -> None:
    tokens = Inputs(*(None if t is None else t.float() for t in inputs(None)))
    single = Memories(*(Net(*(part.float() for part in each)) for each in FIVE))
    o, _ = self_modifying(tokens, (4, 4), single, Gates(GATES[0].float(), GATES[1].float(), GATES[2]))
    exact, _ = self_modifying(inputs(None), (4, 4), FIVE, GATES)
    assert (o - exact).norm() < 1e-5 * exact.norm()


def test_memories_stay_bounded() -> None:
    """The rule as printed runs away within one row: long values make targets longer still, large weights steps too long."""
    tokens = Inputs(4 * numbers(1, 1, 1024, 16), F.normalize(numbers(1, 1, 1024, 16, seed=1), dim=-1))
    nets = [
        Net(0.25 * numbers(1, 1, n, 16, 16, seed=n), 0.1 * numbers(1, 1, n, o, 16, seed=n))
        for n, o in ((2, 16), (2, 1), (1, 16))
    ]
    gates = Gates(torch.zeros(1).double(), torch.full((1,), 9.0).double(), 0.05)

    def largest(steep: float, **changes: float) -> float:
        memories = Memories(nets[0]._replace(down=steep * nets[0].down), *nets[1:])
        o, state = self_modifying(tokens, (16, 16), memories, gates._replace(**changes))
        assert state is not None
        weights = torch.cat([part.flatten() for part in (*state.memories.vectors, *state.memories.main, o)])
        return float(weights.abs().nan_to_num(torch.inf).max())

    assert largest(1.0, unit_values=False) > 1e6 > 1e5 * largest(1.0)
    assert largest(40.0) > 1e6 > 1e4 * largest(40.0, clip=1.0)


Form = Callable[[Tensor | None, int, int, object], tuple[Tensor, object]]


def run_linear(rule: str) -> Form:
    def run(starts: Tensor | None, first: int, last: int, state: object) -> tuple[Tensor, object]:
        tokens = pairs(starts)
        part = Pairs(*(x[:, :, first:last] for x in tokens[:5]), None if starts is None else starts[:, first:last])
        return linear_memory(rule, part, 4, numbers(H, K, K), state)  # type: ignore[arg-type]

    return run


def run_titans(starts: Tensor | None, first: int, last: int, state: object) -> tuple[Tensor, object]:
    tokens = surprises(starts)
    part = Surprises(*(x[:, :, first:last] for x in tokens[:6]), None if starts is None else starts[:, first:last])
    return titans(part, 4, net(1), state)  # type: ignore[arg-type]


def run_self_modifying(momentum: bool, chunks: tuple[int, int], recompute: bool = False, gates: Gates = GATES) -> Form:
    def run(starts: Tensor | None, first: int, last: int, state: object) -> tuple[Tensor, object]:
        part = Inputs(*(t if t is None else t[:, :, first:last] for t in inputs(None, momentum)))
        part = part._replace(starts=None if starts is None else starts[:, first:last])
        return self_modifying(part, chunks, FIVE, gates, state, recompute=recompute)  # type: ignore[arg-type]

    return run


FORMS: dict[str, Form] = {
    "linear": run_linear("linear"),
    "delta": run_linear("delta"),
    "titans": run_titans,
    "self-modifying": run_self_modifying(False, (4, 4)),
    "self-modifying-momentum": run_self_modifying(True, (4, 4)),
    "self-modifying-two-chunks": run_self_modifying(True, (12, 4)),
    "self-modifying-per-layer": run_self_modifying(True, (12, 4), gates=GATES._replace(per_layer=True)),
}


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_its_two_halves_with_the_state_handed_on(form: str, starts: Tensor | None) -> None:
    whole, end = FORMS[form](starts, 0, 24, None)
    first, state = FORMS[form](starts, 0, 12, None)
    second, last = FORMS[form](starts, 12, 24, state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-12, atol=1e-13)
    for a, b in zip(flat(last), flat(end), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def flat(state: object) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [] if state is None else [t for part in state for t in flat(part)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", FORMS)
def test_a_document_reads_nothing_of_the_one_before(form: str) -> None:
    """Outputs of a document, and the state that it leaves, are those of a row that begins with it."""
    both, state = FORMS[form](STARTS, 0, 24, None)
    noisy = [10 * torch.ones_like(t) for t in flat(state)]
    _, after_noise = FORMS[form](STARTS, 0, 24, refill(state, iter(noisy)))
    # Row 1 begins documents at tokens 11, 12 and 23, row 0 at 0: whatever came in is forgotten there.
    again, _ = FORMS[form](STARTS, 0, 24, refill(state, iter(noisy)))
    torch.testing.assert_close(again[0], both[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(again[1, :, 11:], both[1, :, 11:], rtol=1e-12, atol=1e-13)
    assert (again[1, :, :11] - both[1, :, :11]).abs().max() > 1e-3
    for a, b in zip(flat(after_noise), flat(state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def refill(state: object, values: object) -> object:
    if isinstance(state, Tensor):
        return next(values)  # type: ignore[call-overload]
    parts = [None if part is None else refill(part, values) for part in state]  # type: ignore[attr-defined]
    return type(state)(*parts)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
@pytest.mark.parametrize("form", FORMS)
def test_i16_no_token_hears_of_a_later_one(form: str, starts: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = FORMS[form](starts, 0, 24, None)
    original = numbers

    def disturbed(*shape: int, seed: int = 0) -> Tensor:
        x = original(*shape, seed=seed)
        if shape[:3] == (B, H, T):
            x[:, :, 13:] += 1.0
        return x

    monkeypatch.setitem(globals(), "numbers", disturbed)
    later, _ = FORMS[form](starts, 0, 24, None)
    assert torch.equal(later[:, :, :13], base[:, :, :13])
    assert not torch.equal(later[:, :, 13:], base[:, :, 13:])


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
def test_recomputed_chunks_give_the_same_gradients(starts: Tensor | None) -> None:
    def gradient(recompute: bool) -> list[Tensor]:
        tokens = inputs(starts, True)
        leaves = [t.requires_grad_() for t in (tokens.x, tokens.q, *FIVE.vectors, *FIVE.gates, *FIVE.main)]
        o, _ = self_modifying(tokens, (4, 2), FIVE, GATES, hand_on=False, recompute=recompute)
        grads = torch.autograd.grad((o * numbers(*o.shape, seed=50)).sum(), leaves)
        for leaf in leaves:
            leaf.requires_grad_(False)
        return list(grads)

    for a, b in zip(gradient(False), gradient(True), strict=True):
        assert torch.equal(a, b)


def test_gradients_agree_with_finite_differences() -> None:
    """Of all that self-modifying Titans are given, the state they go on from included, and of all they say and hand on."""
    tokens = inputs(STARTS, True).runs(8)[0]
    state = self_modifying(inputs(None, True), (4, 2), FIVE, GATES)[1]
    assert state is not None and state.momentum is not None and tokens.log_momentum is not None
    parts = [x for each in (FIVE, state.memories, state.momentum) for own in each for x in own]

    def smt(x: Tensor, q: Tensor, momentum: Tensor, rate: Tensor, keep: Tensor, *parts: Tensor) -> Any:
        nets = [Net(*parts[n : n + 2]) for n in range(0, 18, 2)]
        initial, now, speed = (Memories(*nets[n : n + 3]) for n in (0, 3, 6))
        gates = GATES._replace(rate_bias=rate, keep_bias=keep, clip=0.3)
        o, left = self_modifying(Inputs(x, q, momentum, tokens.starts), (4, 2), initial, gates, State(now, speed))
        assert left is not None and left.momentum is not None
        return o, *(x for each in (*left.memories, *left.momentum) for x in each)

    given = (tokens.x, tokens.q, tokens.log_momentum, GATES.rate_bias, GATES.keep_bias, *parts)
    assert torch.autograd.gradcheck(smt, [t.detach().clone().requires_grad_() for t in given], fast_mode=True)

    def lmm(k: Tensor, v: Tensor, up: Tensor) -> Tensor:
        each = surprises()
        part = Surprises(*(x[:, :, :8] for x in each[:6]), STARTS[:, :8])._replace(k=k, v=v)
        return titans(part, 4, net(1)._replace(up=up))[0]

    each = surprises()
    leaves = [t.clone().requires_grad_() for t in (each.k[:, :, :8], each.v[:, :, :8], net(1).up)]
    assert torch.autograd.gradcheck(lmm, leaves, fast_mode=True)


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="12 tokens of the makers' chunk are no multiple of the chunk of 5; 1, 2, 3, 4, 6, 12 would work",
    ):
        self_modifying(inputs(), (12, 5), FIVE, GATES)
    with pytest.raises(ValueError, match="24 tokens are no multiple of the chunk of 7; 3, 4, 6, 8, 12, 24 would work"):
        linear_memory("delta_frozen", pairs(), 7, numbers(H, K, K))
    with pytest.raises(ValueError, match="1 tokens are no multiple of the chunk of 7; 1 would work"):
        linear_memory("delta_frozen", pairs(None, 1), 7, numbers(H, K, K))


def prepared_alone(rule: str, tokens: Pairs, initial: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk of these tokens by the operator, however few they are."""
    given, told = prepared(rule, tokens, tokens.k.shape[2], initial, state)
    o, last = matrix_memory(given)
    return o if told is None else o + told, last


@pytest.mark.parametrize("chunk", [7, 40])
@pytest.mark.parametrize("rule", ["linear", "delta", "dgd"])
def test_a_last_chunk_may_be_shorter_where_the_rule_knows_no_chunks(rule: str, chunk: int) -> None:
    initial = numbers(H, K, K)
    for found, expected in zip(
        linear_memory(rule, pairs(), chunk, initial), serial(rule, pairs(), initial), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunks", [(10, 5), (5, 5), (32, 2)])
def test_what_is_left_of_a_chunk_waits_to_be_written(chunks: tuple[int, int]) -> None:
    """It is in the state; who wants no state hears the same."""
    o, left = self_modifying(inputs(), chunks, FIVE, GATES)
    assert left is not None and left.pending is not None and left.pending.x.shape[2] == T % chunks[0]
    assert torch.equal(o, self_modifying(inputs(), chunks, FIVE, GATES, hand_on=False)[0])
    _, memory = titans(surprises(), chunks[0], net(1))
    assert memory.pending is not None and memory.pending.k.shape[2] == T % chunks[0]


def test_strong_forgetting_loses_no_digits() -> None:
    """The share left after a chunk is 1e-9 and the chunk form has every digit of the recurrence (W1)."""
    tokens = pairs(None)._replace(log_keep=torch.full((B, H, T), -20.7 / T).double())
    o, state = linear_memory("delta", tokens, 24, numbers(H, K, K))
    expected, last = serial("delta", tokens, numbers(H, K, K))
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-14)


def test_two_chunk_sizes_are_one_where_they_agree_and_differ_where_not() -> None:
    one, _ = self_modifying(inputs(None), (12, 12), FIVE, GATES)
    two, _ = self_modifying(inputs(None), (12, 4), FIVE, GATES)
    assert torch.equal(one[:, :, :4], two[:, :, :4])
    assert not torch.allclose(one[:, :, 4:12], two[:, :, 4:12])


def test_the_last_chunk_writes_only_where_the_state_is_wanted() -> None:
    o, state = self_modifying(inputs(), (4, 2), FIVE, GATES, hand_on=False)
    assert state is None and torch.equal(o, self_modifying(inputs(), (4, 2), FIVE, GATES)[0])
    assert isinstance(self_modifying(inputs(), (4, 2), FIVE, GATES)[1], State)
    assert isinstance(titans(surprises(), 4, net(1))[1], Memory)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
@pytest.mark.parametrize("chunks", [(4, 2), (4, 4), (12, 4), (24, 8), (24, 24)])
def test_momentum_that_nobody_asks_for_is_not_made(
    chunks: tuple[int, int], starts: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last writes' part in it is left out where the state is not handed on; outputs and gradients are the same."""
    found, real = [], walk.lesson
    for hand_on in (True, False):
        alone: list[bool] = []

        def noted(*given: Any, seen: list[bool] = alone) -> Any:
            said = real(*given)
            seen.append(len(said.weights) == 1)
            return said

        monkeypatch.setattr(walk, "lesson", noted)
        tokens = inputs(starts, True)
        leaves = [t.requires_grad_() for t in (tokens.x, tokens.q, *FIVE.vectors, *FIVE.gates, *FIVE.main)]
        o, _ = self_modifying(tokens, chunks, FIVE, GATES._replace(clip=0.3), None, hand_on)
        grads = torch.autograd.grad((o * numbers(*o.shape, seed=50)).sum(), leaves, allow_unused=True)
        found.append([o, *(torch.zeros(()).double() if each is None else each for each in grads)])
        anchors = 1 if starts is None else 2
        assert sum(alone) == (0 if hand_on else anchors * sum(size < T for size in chunks))
        for leaf in leaves:
            leaf.requires_grad_(False)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.expand_as(b), b, rtol=1e-12, atol=1e-14)


def slope(values: Tensor) -> float:
    """Of errors over places."""
    place = torch.arange(len(values), dtype=torch.float64)
    return float(((place - place.mean()) * (values - values.mean())).sum() / (place - place.mean()).square().sum())


def sums(*maps: Tensor) -> Net:
    """Memories that say z + L z exactly, L (D, D): silu(z) - silu(-z) = z."""
    ups = torch.stack([torch.cat([torch.eye(len(each)).double(), -torch.eye(len(each)).double()]) for each in maps])
    return Net(ups[None, None], torch.stack([torch.cat([each, -each], 1) for each in maps])[None, None])


@pytest.mark.parametrize("memory", ["titans", "self-modifying"])
def test_row_16_networks_learn_a_regression_in_context_by_writes_alone(memory: str) -> None:
    """As below, of v = W k / |W k| by Titans' memory, and by five that make keys and values of (k, v), all written."""
    generator = torch.Generator().manual_seed(5)
    k = F.normalize(torch.randn(64, 1, 96, 8, generator=generator, dtype=torch.float64), dim=-1)
    v = F.normalize(k @ torch.randn(64, 1, 8, 8, generator=generator, dtype=torch.float64), dim=-1)
    key, value = torch.cat([k, 0 * v], -1), torch.cat([0 * k, v], -1)
    up, down = torch.randn(32, 16, generator=generator).double(), torch.randn(16, 32, generator=generator).double()
    main, nothing = Net(0.5 * up[None, None, None], 0.02 * down[None, None, None]), torch.zeros(64, 1, 96).double()
    first = torch.diag(torch.arange(16) < 8).double()  # what of a token is its key
    makers = sums(first - torch.eye(16), -first), Net(torch.zeros(1, 1, 2, 16, 16), torch.zeros(1, 1, 2, 1, 16))
    five = Memories(makers[0], Net(*(part.double() for part in makers[1])), main)

    def errors(rate: float) -> Tensor:
        if memory == "titans":
            read, _ = titans(Surprises(key, key, value, rate + nothing, nothing - 2000.0, nothing), 1, main)
        else:
            biases = Gates(torch.zeros(1).double(), torch.full((1,), torch.inf).double(), 2 * rate)
            read, _ = self_modifying(Inputs(key + value, key), (1, 1), five, biases)
        return (read - value).square().sum(-1).mean((0, 1))

    still, learning = errors(0.0), errors(0.2 if memory == "titans" else 0.05)
    assert abs(slope(still)) < 1e-4 * float(still.mean())
    assert slope(learning) < -3e-3 * float(still.mean())
    # what self-modifying Titans learn is what they say to the value, and erasing takes half of it (V10)
    assert float(learning[-8:].mean()) < (0.2 if memory == "titans" else 0.6) * float(still.mean())


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_row_16_in_context_regression_is_learned_by_writes_alone(rule: str) -> None:
    """Squared error of v = W k before each example is written, over 64 tasks, beside recursive least squares."""
    generator = torch.Generator().manual_seed(5)
    k = F.normalize(torch.randn(64, 1, 97, 8, generator=generator, dtype=torch.float64), dim=-1)
    v = k @ torch.randn(64, 1, 8, 4, generator=generator, dtype=torch.float64)
    gates = torch.ones(64, 1, 96, dtype=torch.float64)

    def errors(rate: float) -> Tensor:
        tokens = Pairs(k[:, :, 1:], k[:, :, :-1], v[:, :, :-1], rate * gates, 0 * gates)
        read, _ = linear_memory(rule, tokens, 16, torch.zeros(1, 4, 8, dtype=torch.float64))
        return (read - v[:, :, 1:]).square().sum(-1).mean((0, 1))  # by position: what the next token meets

    inverse = 1e6 * torch.eye(8, dtype=torch.float64).expand(64, 8, 8)
    known, least = torch.zeros(64, 4, 8, dtype=torch.float64), []
    for t in range(96):
        gain = inverse @ k[:, 0, t, :, None]
        gain = gain / (1 + k[:, 0, t, None, :] @ gain)
        known = known + (v[:, 0, t, :, None] - known @ k[:, 0, t, :, None]) @ gain.mT
        inverse = inverse - gain @ k[:, 0, t, None, :] @ inverse
        least.append((known @ k[:, 0, t + 1, :, None] - v[:, 0, t + 1, :, None]).square().sum((1, 2)).mean())
    still, learning = errors(0.0), errors(1.0 if rule == "delta" else 0.08)
    first = float(still.mean())
    assert abs(slope(still)) < 0.1 * abs(slope(learning))
    assert slope(learning) < -1e-3 * first
    if rule == "delta":  # Hebbian writes do not erase, and never get as far
        assert float(learning[-8:].mean()) < 1e-3 * first and float(torch.stack(least)[-8:].mean()) < 1e-6 * first
        assert float((learning - torch.stack(least)).abs()[48:].max()) < 2e-2 * first
