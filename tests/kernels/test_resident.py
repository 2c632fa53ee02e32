"""The walk with its memory on chip: the kernels, interpreted, against the chunks one by one in float64, and the operator."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from nlscale_kernels import tuned
from nlscale_kernels.mlp_memory import Net
from nlscale_kernels.self_modifying import Gates, Memories, Tokens, resident, self_modifying, triton_backward
from nlscale_kernels.self_modifying.given import DIFFERENTIABLE, Given, check_on_gpu
from nlscale_kernels.self_modifying.resident import KERNELS
from nlscale_kernels.switch import kernels
from torch import Tensor

B, H, CHUNK, COUNT = 2, 2, 6, 3
STARTS = torch.zeros(B, CHUNK * COUNT, dtype=torch.bool)
STARTS[0, [3, 13]] = STARTS[1, [6, 11, 16]] = True
CASES = [
    pytest.param(
        *case, id="-".join(name for on, name in zip(case, ("momentum", "documents", "clip", "last"), strict=True) if on)
    )
    for case in itertools.product((False, True), repeat=4)
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def given(
    momentum: bool,
    documents: bool,
    clip: bool,
    last: bool,
    sizes: tuple[int, int, int] = (CHUNK, 5, 7),
    starts: Tensor = STARTS,
) -> Given:
    """`last`: the last chunk is not written; `sizes`: tokens of a chunk, width of keys, units."""
    (chunk, K, M), N = sizes, COUNT - last
    T, written = chunk * COUNT, chunk * N
    fresh = torch.cat([part.cumsum(-1) > 0 for part in starts.split(chunk, 1)], 1) if documents else None
    factors = torch.sigmoid(numbers(B, H, N, 4, seed=9))
    if fresh is not None:  # nothing of a momentum goes on where a document begins
        factors[..., 1:] *= live(fresh, N)
    return Given(
        *(numbers(B, H, T, K, seed=seed) for seed in range(3)),
        torch.sigmoid(numbers(B, H, T, seed=3)),
        0.5 * numbers(B, H, written, K, seed=4),
        torch.sigmoid(numbers(B, H, written, seed=5)),
        torch.sigmoid(numbers(B, H, written, seed=6)) if momentum else None,
        0.9 * torch.eye(K, dtype=torch.float64) + 0.1 * numbers(B, H, N, K, K, seed=7),
        factors,
        fresh,
        *(0.5 * numbers(B, H, *shape, seed=10) for shape in ((M, K), (K, M))),
        *(0.1 * numbers(B, H, *shape, seed=11) if momentum else None for shape in ((M, K), (K, M))),
        *(0.5 * numbers(H, *shape, seed=12) for shape in ((M, K), (K, M))),
        chunk,
        1.5 if clip else 0.0,
    )


def live(fresh: Tensor, count: int) -> Tensor:
    chunk = fresh.shape[1] // COUNT
    return (~fresh[:, chunk - 1 :: chunk][:, :count]).double()[:, None, :, None]


def single(this: Given) -> Given:
    return Given._make(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in this)


def ends(said: tuple[Tensor, ...]) -> list[Tensor]:
    return [numbers(*x.shape, seed=20) for x in said]


@pytest.mark.parametrize(("momentum", "documents", "clip", "last"), CASES)
def test_kernels(momentum: bool, documents: bool, clip: bool, last: bool) -> None:
    assert worst(given(momentum, documents, clip, last))[0] <= 0


@pytest.mark.parametrize("sizes", [(40, 19, 33), (33, 33, 17), (16, 64, 64)])
def test_kernels_whose_chunks_and_widths_take_several_tiles(sizes: tuple[int, int, int]) -> None:
    starts, chunk = torch.zeros(B, sizes[0] * COUNT, dtype=torch.bool), sizes[0]
    starts[0, [chunk // 2, 2 * chunk + 1]] = starts[1, [chunk, 2 * chunk - 1]] = True
    assert worst(given(True, True, True, False, sizes, starts))[0] <= 0


def worst(this: Given) -> tuple[float, str]:
    """The kernels, interpreted, against the chunks one by one: by how much an error is above what it may be at most, 1e-5
    of what is said and 2e-5 of gradients, and whose it is.
    """
    said = resident.looped(this)
    mine = triton_backward.walked(single(this))
    found = {name: (x, y, 1e-5) for name, x, y in zip(mine._fields, mine, said, strict=False)}
    of = ends(said)
    expected = resident.gradients(this, of)
    back = triton_backward.gradients(single(this), mine.kept, [x.float() for x in of])
    for name, d, theirs in zip(DIFFERENTIABLE, back, expected, strict=True):
        if name == "factors" and this.fresh is not None:  # those of zeros
            for each in (d, theirs):
                each[..., 1:] *= live(this.fresh, theirs.shape[2]).to(each.dtype)
        assert d.shape == theirs.shape
        found[f"d {name}"] = d, theirs, 2e-5
    assert all(bool(x.isfinite().all()) for x, _, _ in found.values())
    left = {name: float((x.double() - y).norm()) - limit * float(y.norm()) for name, (x, y, limit) in found.items()}
    return max((each, name) for name, each in left.items())


@pytest.mark.parametrize(("momentum", "documents"), [(False, False), (True, True)])
def test_operator_is_well_formed_and_twice_differentiable(momentum: bool, documents: bool) -> None:
    this = given(momentum, documents, True, False, (CHUNK, 2, 3))
    names = [name for name in DIFFERENTIABLE if getattr(this, name) is not None]
    leaves = [getattr(this, name).requires_grad_() for name in names]
    torch.library.opcheck(
        resident.resident, tuple(this), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = resident.resident(*this._replace(**dict(zip(names, tensors, strict=True))))
        return tuple(found[: 5 if momentum else 3])

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_what_a_gpu_runs_is_the_operator() -> None:
    this = single(given(True, True, True, True))
    said = resident.looped(this)
    found = resident.resident._backend_fns["cuda"](*this)
    for mine, theirs in zip(found, said, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    of = [x.float() for x in ends(said)]
    mine = resident.backward._backend_fns["cuda"](*this, found[-1], of)
    torch.testing.assert_close(mine[0], resident.gradients(this, of)[0], rtol=1e-4, atol=1e-5)


def whole(
    starts: Tensor | None, hand_on: bool, recompute: bool, form: Any = self_modifying, count: int = COUNT
) -> list[Tensor]:
    """Outputs, states and gradients of self-modifying Titans."""
    K, T = 4, CHUNK * count

    def net(count: int, out: int, seed: int) -> Net:
        return Net(0.3 * numbers(1, H, count, 5, K, seed=seed), 0.3 * numbers(1, H, count, out, 5, seed=seed + 1))

    memories = Memories(net(2, K, 30), net(2, 1, 40), net(1, K, 50))
    tokens = Tokens(numbers(B, H, T, K), numbers(B, H, T, K, seed=1), F.logsigmoid(numbers(B, H, T)), starts)
    gates = Gates(torch.zeros(H).double(), torch.full((H,), 2.0).double(), 0.8, clip=0.4)
    leaves = [x.requires_grad_() for x in (tokens.x, tokens.q, *(part for each in memories for part in each))]
    o, state = form(tokens, (CHUNK, CHUNK // 2), memories, gates, None, hand_on, recompute)
    after = [] if state is None else [part for each in (*state.memories, *(state.momentum or ())) for part in each]
    total = sum((x * numbers(*x.shape, seed=60)).sum() for x in (o, *after))
    return [o, *after, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one-document", "documents"])
@pytest.mark.parametrize(("hand_on", "recompute"), [(True, False), (False, True)])
def test_memories_by_the_operator_are_memories_by_chunks(
    starts: Tensor | None, hand_on: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = whole(starts, hand_on, recompute)
    calls = []
    monkeypatch.setattr(resident, "fits", lambda q, net, count: calls.append(count) or count > 0)
    for mine, theirs in zip(whole(starts, hand_on, recompute), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert set(calls) == ({2} if hand_on else {2, 1})


def test_torch_compiles_memories_with_the_operator_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "fits", lambda q, net, count: count > 0)
    compiled = torch.compile(self_modifying, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(whole(None, True, False, compiled, 2), whole(None, True, False, count=2), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_only_a_gpu_with_room_takes_the_operator() -> None:
    net = Net(torch.zeros(1, 1, 1, 5, 4), torch.zeros(1, 1, 1, 4, 5))
    assert not resident.fits(torch.zeros(1, 1, 6, 4), net, 2)
    assert "cuda" not in resident.resident._disabled_kernel
    with kernels("reference"):
        assert "cuda" in resident.resident._disabled_kernel  # what `fits` asks


@pytest.mark.parametrize(
    ("arch", "version", "written", "is_able"),
    [
        (80, "3.8.0", KERNELS, False),
        (90, "3.8.0", (), True),
        (90, "3.7.1", (), True),
        (90, "3.6.0", (), False),
        (90, "3.7.0", KERNELS[:1], False),
        (90, "3.6.0", (*KERNELS, "symmetric_product"), True),
        (100, "3.6.0", (), True),
    ],
)
def test_where_triton_may_be_wrong_a_gpu_must_have_shown_that_it_is_right(
    arch: int, version: str, written: tuple[str, ...], is_able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in a graph, too."""
    monkeypatch.setattr(tuned, "device_facts", lambda index: (f"double {index}", arch))
    monkeypatch.setattr(tuned, "entries", lambda name: dict.fromkeys(written, []) if "double_3" in name else {})
    monkeypatch.setattr(triton, "__version__", version)
    torch.compiler.reset()  # what is asked while it traces is not asked again
    asked = torch.compile(lambda x: x + 1 if resident.able(3) else x, fullgraph=True, backend="eager")
    assert resident.able(3) is is_able and asked(torch.zeros(1)).item() == is_able


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": numbers(B, H, 17, 5)}, r"k is .*; it must be"),
        ({"hold": None}, r"up_speed is .*; it must be None"),
        ({"turn": numbers(B, H, 4, 5, 5)}, "turn is of 4 chunks of 6 tokens; there are 18"),
        ({"down": numbers(B, H, 5, 7).float()}, "down is .*float32.*; it must be .*float64"),
        ({"fresh": torch.zeros(B, 17).bool()}, r"fresh is .*17.*; it must be"),
        ({"fresh": torch.zeros(B, 18)}, r"fresh is .*float32.*; it must be"),
        ({"chunk": 4, "turn": numbers(B, H, 2, 5, 5)}, "there are 18 tokens, which must be whole chunks"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resident.resident(*given(True, True, False, False)._replace(**change))


@pytest.mark.parametrize(
    ("q", "up", "words"),
    [
        (numbers(1, 1, 4, 8), numbers(1, 1, 8, 8), "q is torch.float64; on a GPU it takes torch.float32"),
        (
            numbers(1, 1, 4, 80).float(),
            numbers(1, 1, 80, 80).float(),
            r"up is \(80, 80\); heads and units of at most 64",
        ),
    ],
)
def test_what_the_kernels_cannot_take_is_named(q: Tensor, up: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_on_gpu(q, up)
