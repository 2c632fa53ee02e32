"""Every mixer: its parameters by name, causality, documents apart, a row in two parts, what is refused."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor

from nlscale.config.errors import UserError
from nlscale.config.levels import parameter_names
from nlscale.config.run import Run
from nlscale.config.shapes import MIXERS, mixer_shapes
from nlscale.model.count import FLOPS, flops_a_token, parameters
from nlscale.model.hope import Hope
from nlscale.model.init import TABLE
from nlscale.model.mixers import MIXERS as BUILT
from nlscale.model.row_state import mapped
from nlscale.optim.layout import is_matrix
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.tiny import tiny

CHUNKS = ["model.linear.chunk=4", "model.written.chunk=4", "model.titans.chunk=4", "model.self_modifying.chunk=2"]
CHUNKS += ["model.self_modifying.maker_chunk=4", "model.layers=2"]
CASES = {name: [f"model.mixer={name}"] for name in MIXERS}
CASES["attention-window"] = ["model.window=5"]
CASES["written-linear-window"] = ["model.mixer=written", "model.written.rule=linear", "model.window=5"]
CASES["titans_mag-window"] = ["model.mixer=titans_mag", "model.window=5"]
CASES["self_modifying-gate"] = ["model.mixer=self_modifying", "model.self_modifying.gate=true"]
CASES["self_modifying-swiglu"] = ["model.mixer=self_modifying", "model.self_modifying.activation=swiglu"]
CASES["titans_mac-gelu"] = ["model.mixer=titans_mac", "model.titans.activation=gelu"]
CASES["titans_mag-swiglu"] = ["model.mixer=titans_mag", "model.titans.activation=swiglu"]
CASES["self_modifying-query"] = ["model.mixer=self_modifying", "model.self_modifying.query=true"]
CASES["self_modifying-per-layer"] = ["model.mixer=self_modifying", "model.self_modifying.per_layer=true"]
CASES["self_modifying-plain"] = ["model.mixer=self_modifying", "model.self_modifying.momentum=false"]


def built(run: Run) -> tuple[Hope, list]:
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64)
    with torch.no_grad():  # initial values are small: what a test looks for must be seen
        for leaf in model.leaves:
            if leaf.name.split(".")[-1] in ("up", "down") or "out.weight" in leaf.name:
                leaf.value.mul_(8)
    return model.chunks[0], model.leaves


def names(run: Run) -> tuple[list[str], dict[str, tuple], dict[str, int], int, list[str]]:
    _, leaves = built(run)
    shapes = {leaf.name.split(".", 3)[3]: leaf.shape(1) for leaf in leaves if leaf.name.startswith("blocks.0.mix.")}
    matrices = [leaf.name for leaf in leaves if is_matrix(leaf)]
    total = sum(leaf.value.numel() for leaf in leaves)
    return [leaf.name for leaf in leaves], shapes, parameters(run.model, run.levels), total, matrices


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_that_the_config_names(case: str) -> None:
    run = tiny(*CHUNKS, *CASES[case])
    ((found, shapes, counted, total, matrices),) = ranks(1, names, run)
    assert sorted(found) == sorted(parameter_names(run.model, run.levels))
    assert shapes == mixer_shapes(run.model)
    assert sum(counted.values()) == total
    for name in found:
        assert sum(fnmatchcase(name, pattern) for pattern, _ in TABLE) == 1, name
    assert not [
        name for name in matrices if any(part in name for part in (".memory.", "persistent", "convolution", "gain"))
    ]
    assert flops_a_token(run.model, run.levels, 16) > 6 * sum(n for n in counted.values()) * 0.5


def test_the_tables_name_the_same_mixers() -> None:
    assert set(MIXERS) == set(BUILT) == set(FLOPS)


def states(model: Hope, tokens: Tensor, starts: Tensor, cut: int | None = None) -> Tensor:
    """Activations (T, B, D) after the last block; with `cut`, in two calls with what mixers hand on."""
    with torch.no_grad():
        x = model.enter(tokens)
        if cut is None:
            return model.walk(x, model.scene(starts))[0]
        first, left = model.walk(x[:cut], model.scene(starts[:, :cut], hand_on=True))
        second, _ = model.walk(x[cut:], model.scene(starts, past=cut), left)
        return torch.cat([first, second])


def heard(run: Run) -> dict[str, float]:
    """Largest changes: of tokens before and after a disturbed one, and of its document and the next."""
    model, _ = built(run)
    tokens = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, 16, dtype=torch.bool)
    starts[0, [0, 7]] = starts[1, 10] = True
    base, nowhere = states(model, tokens, starts), torch.zeros_like(starts)
    later, other = tokens.clone(), tokens.clone()
    later[:, 9] = 1 + later[:, 9] % 126
    other[:, 3] = 1 + other[:, 3] % 126
    moved, apart = (states(model, changed, starts) - base for changed in (later, other))
    flowing = states(model, other, nowhere) - states(model, tokens, nowhere)
    return {
        "before": float(moved[:9].abs().max()),
        "after": float(moved[12:].abs().max()),
        "document": float(apart[4:7].abs().max()),
        "next document": float(torch.cat([apart[7:, 0], apart[10:, 1]]).abs().max()),
        "no documents": float(flowing[8:].abs().max()),
        "halves": max(
            float((states(model, tokens, s, 8) - states(model, tokens, s)).abs().max()) for s in (starts, nowhere)
        ),
    }


def one_by_one(run: Run) -> tuple[list[float], list[float]]:
    """How a row read token by token differs from one pass, of one document and of three; how far each token of the first
    is moved by a disturbed one at 2.
    """
    model, _ = built(run)
    tokens = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    nowhere, other = torch.zeros_like(tokens, dtype=torch.bool), tokens.clone()
    other[:, 2] = 1 + other[:, 2] % 126
    begins = nowhere.clone()
    begins[0, [0, 7, 8]] = begins[1, 10] = True
    apart = []
    for starts in (nowhere, begins):
        x, said, left = model.enter(tokens), [], None
        with torch.no_grad():
            for t in range(16):
                place = model.scene(starts[:, : t + 1], past=t, hand_on=True)
                step, left = model.walk(x[t : t + 1], place, left)
                said.append(step)
        apart.append(float((torch.cat(said) - states(model, tokens, starts)).abs().max()))
    return apart, (states(model, other, nowhere) - states(model, tokens, nowhere)).abs().amax((1, 2)).tolist()


ALONE = ["linear", "written", "titans", "self_modifying", "self_modifying.maker"]  # whose chunks are single tokens
TOKENS = [f"model.{name}_chunk=1" if "." in name else f"model.{name}.chunk=1" for name in ALONE]


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "attention"])
def test_a_memory_reads_a_row_token_by_token(mixer: str) -> None:
    """With what it hands on: documents begin at tokens whose convolution reaches into the one before."""
    ((one, documents), moved) = ranks(1, one_by_one, tiny(*CHUNKS, *TOKENS, f"model.mixer={mixer}"))[0]
    assert one < 1e-12 and documents < 1e-12
    assert all(each > 1e-9 for each in moved[2:]) and all(each == 0 for each in moved[:2])


@pytest.mark.parametrize(("case", "reach"), [("attention", 16), ("attention-window", 8)])
def test_row_12_decoding_with_keys_and_values_is_the_full_forward(case: str, reach: int) -> None:
    """Token by token; two layers whose attention sees 5 tokens carry a token 8 further, and no one after hears of it."""
    apart, moved = ranks(1, one_by_one, tiny(*CHUNKS, *CASES[case]))[0]
    assert max(apart) < 1e-12
    assert all(each > 1e-9 for each in moved[2 : 2 + reach + 1])
    assert all(each == 0 for each in moved[2 + reach + 1 :]) and all(each == 0 for each in moved[:2])


@pytest.mark.parametrize("case", CASES)
def test_i16_tokens_hear_of_the_past_of_their_document_alone(case: str) -> None:
    """And a row is its two halves with the state handed on: for attention that is decoding with its keys and values."""
    (seen,) = ranks(1, heard, tiny(*CHUNKS, *CASES[case]))
    assert seen["before"] == 0
    assert seen["next document"] < 1e-14
    assert seen["after"] > 1e-6 and seen["document"] > 1e-6
    assert seen["no documents"] > 1e-9
    assert seen["halves"] < 1e-12


REFUSED = {
    "model.mixer=attentoin": "model.mixer=attentoin is no mixer; choose one of attention, linear",
    "model.mixer=delta model.linear.chunk=5": "model.linear.chunk=5 does not divide the 16 tokens of a row; 1, 2, 4, 8, 16",
    "model.mixer=titans model.titans.chunk=32": "model.titans.chunk=32 does not divide the 16 tokens",
    "model.mixer=delta model.linear.chunk=16 parallel.context=2": "the 8 tokens of a row on each of parallel.context=2",
    "model.mixer=self_modifying model.self_modifying.chunk=4 model.self_modifying.maker_chunk=6": "4, 8, 16 would work",
    "model.mixer=self_modifying parallel.tensor=8": "=8; parallel.tensor in [1, 2, 4] or model.heads=8 would",
    "parallel.context=4": "model.kv_heads=2 cannot be split over parallel.tensor x parallel.context=4",
    "parallel.context=3": "model.heads=4 cannot be split",
    "model.loops=2 parallel.pipeline=2": "model.loops=2 passes the same blocks again",
    "model.self_modifying.erase=false model.self_modifying.per_layer=true": "per_layer=true needs erase=true",
    "model.titans.rate=-0.1": "model.titans.rate=-0.1 must not be negative",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_does_not_fit_is_refused_on_the_login_node(overrides: str) -> None:
    with pytest.raises(UserError) as refusal:
        tiny(*[*CHUNKS, *overrides.split()])
    assert REFUSED[overrides] in str(refusal.value)


def looped(loops: int) -> tuple[Tensor, Tensor]:
    """A model's states, and those of its blocks applied by hand so many times."""
    model, _ = built(tiny(*CHUNKS, f"model.loops={loops}"))
    tokens = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, 16, dtype=torch.bool)
    with torch.no_grad():
        x, place = model.enter(tokens), model.scene(starts)
        for _ in range(loops):
            for block in model.blocks:
                x, _ = block(x, place)
    return states(model, tokens, starts), x


def test_row_27_a_loop_passes_the_same_blocks_again() -> None:
    once, by_hand = ranks(1, looped, 1)[0]
    thrice, thrice_by_hand = ranks(1, looped, 3)[0]
    assert torch.equal(once, by_hand) and torch.equal(thrice, thrice_by_hand)
    assert not torch.allclose(once, thrice)


# What else hears of earlier tokens is switched off: the short convolution, and attention, which sees each token alone.
ELSE = ["model.window=1", *(f"model.{name}.convolution=1" for name in ("linear", "titans", "self_modifying"))]
FROZEN = {mixer: "" for mixer in MIXERS if mixer not in ("attention", "titans_mac")}
FROZEN |= {"delta": "linear.rate=0", "titans": "titans.rate=0", "self_modifying": "self_modifying.rate=0"}


def echoes(run: Run) -> tuple[float, float, bool]:
    """How a disturbed token changes later ones and itself, and whether all gradients are finite."""
    model, _ = built(run)
    tokens = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    nowhere, other = torch.zeros_like(tokens, dtype=torch.bool), tokens.clone()
    other[:, 3] = 1 + other[:, 3] % 126
    moved = states(model, other, nowhere) - states(model, tokens, nowhere)
    loss = model(tokens, tokens, nowhere)
    slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return (
        float(moved[4:].abs().max()),
        float(moved[3].abs().max()),
        all(s.isfinite().all() for s in slopes if s is not None),
    )


@pytest.mark.parametrize("mixer", FROZEN)
def test_row_16_without_inner_writes_nothing_is_learned_in_context(mixer: str) -> None:
    """One switch freezes whatever moves faster than a step: later tokens hear nothing of a disturbed one; else they do."""
    said = [*CHUNKS, *ELSE, f"model.mixer={mixer}"]
    still = ["model.writes=false", *([f"model.{FROZEN[mixer]}"] if FROZEN[mixer] else [])]
    for each in still:  # the switch, and the mixer's own largest rate
        later, own, finite = ranks(1, echoes, tiny(*said, each))[0]
        assert later == 0 and own > 1e-6 and finite
    assert ranks(1, echoes, tiny(*said))[0][0] > 1e-9


def went_on(run: Run) -> list[float]:
    """How far a row moves the memories of a state that came with a momentum, each tensor of them."""
    model, _ = built(run)
    torch.manual_seed(0)
    before, mixer = (
        mapped(lambda _, part: 0.3 * torch.randn_like(part), "", model.blocks[0].mix.begin(2)),
        run.model.mixer,
    )
    x, found = torch.randn(16, 2, 32, dtype=torch.float64), []
    with torch.no_grad():
        _, left = model.blocks[0].mix(x, model.scene(torch.zeros(2, 16, dtype=torch.bool), hand_on=True), before)
    old, new = (each.memory.net if mixer == "titans" else each.state.memories for each in (before, left))
    mapped(lambda _, a, b: found.append(float((a - b).abs().max())), "", old, new)
    return found


@pytest.mark.parametrize("mixer", ["titans", "self_modifying"])
def test_row_16_nor_does_a_momentum_that_was_handed_on(mixer: str) -> None:
    said = [*CHUNKS, f"model.mixer={mixer}"]
    still, moving = (ranks(1, went_on, tiny(*said, *more))[0] for more in (["model.writes=false"], []))
    assert len(still) >= 2 and max(still) < 1e-14 and min(moving) > 1e-3


def segments(run: Run) -> tuple[float, float]:
    """MAC: how a disturbed token changes its own segment of four, and those after it."""
    model, _ = built(run)
    tokens = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    nowhere, other = torch.zeros_like(tokens, dtype=torch.bool), tokens.clone()
    other[:, 2] = 1 + other[:, 2] % 126
    moved = (states(model, other, nowhere) - states(model, tokens, nowhere)).abs()
    return float(moved[3].max()), float(moved[4:].max())


def test_row_16_mac_hears_its_segment_alone_without_writes() -> None:
    said = [*CHUNKS, *ELSE, "model.mixer=titans_mac"]
    (own, later), (_, written) = (ranks(1, segments, tiny(*said, *more))[0] for more in (["model.writes=false"], []))
    assert own > 1e-9 and later == 0 and written > 1e-9


def mixed(*said: str) -> Tensor:
    """What a block adds to a row, by projections that are the same for every mixer."""
    model, leaves = built(tiny(*CHUNKS, "model.kv_heads=4", "model.layers=1", *said))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in sorted(leaves, key=lambda each: each.name):
            if leaf.name.startswith(("blocks.0.mix.q.", "blocks.0.mix.k.", "blocks.0.mix.v.")):
                leaf.value.copy_(torch.randn(leaf.value.shape, generator=generator, dtype=torch.float64))
        x = torch.randn(16, 2, 32, generator=generator, dtype=torch.float64)
        return model.blocks[0].mix(x, model.scene(torch.zeros(2, 16, dtype=torch.bool)))[0] - x


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_row_9_a_block_that_writes_nothing_is_a_transformers_bit_for_bit(rule: str) -> None:
    said = ["model.mixer=written", f"model.written.rule={rule}"]
    plain, still, writing = (ranks(1, mixed, *each)[0] for each in ([], [*said, "model.writes=false"], said))
    assert torch.equal(plain, still)
    assert (plain - writing).norm() > 1e-3 * plain.norm()
