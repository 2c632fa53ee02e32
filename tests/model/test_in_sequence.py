"""The continuum inside a sequence against its definition, token by token, and its limits. float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nlscale.config.errors import UserError
from nlscale.config.run import Run
from nlscale.model.fast import Whole
from nlscale.model.in_sequence import HopeInSequence
from nlscale.optim.build import build_optimizer
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.parallel.test_equal import gradients
from tests.sampled import sampled
from tests.tiny import micro_batches, tiny
from tests.whole import assemble

TWO = (
    "levels=[{name: quick, period: 4, unit: token, width: 0.5}, "
    "{name: calm, period: 8, unit: token, width: 0.25, inner: 2.0}, {name: slow, period: 2, width: 0.25}]"
)
ONE = "levels=[{name: quick, period: 4, unit: token, width: 1.0}]"
BASE = ["model.layers=2", "model.inner.lr=0.5", "model.inner.clip=0.05"]


def model_of(run: Run) -> HopeInSequence:
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64).chunks[0]
    assert isinstance(model, HopeInSequence)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that what is learned inside a row can be seen
    return model


def batch(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    tokens, targets, starts = (torch.cat(parts) for parts in zip(*micro_batches(run, 0, 0, 1)[:3], strict=True))
    return tokens, targets, starts


def slices(model: HopeInSequence, block: int) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Level -> rows of a block's weights that are its own: (parameter, indices), up and down."""
    found: dict = {}
    for leaf in model.blocks[block].continuum.leaves():
        level = leaf.name.split(".")[0]
        if level in ("quick", "calm") and "norm" not in leaf.name:  # of a level, its weights alone learn inside a row
            found.setdefault(level, []).append((leaf.parameter, torch.arange(leaf.start, leaf.start + leaf.length)))
    return found


def by_hand(
    model: HopeInSequence, run: Run, row: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Prequential loss of one row: weights of its own, moved at boundaries by the gradient of the window's loss. And its
    gradient of the first order: of every token's loss at the weights that it found, what they had learned taken as given.

    Every token's loss comes from a forward pass of the whole row so far with the weights that its chunk began with; tokens
    before the chunk are taken as their own chunks left them, which one adaptive layer does not see.
    """
    tokens, targets, starts = row
    names = {parameter: name for name, parameter in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    inner, total, first = run.model.inner, torch.zeros((), dtype=torch.float64), dict[str, Tensor | float]()
    windows: dict[str, list] = {"quick": [], "calm": []}
    periods = {level.name: (level.period, level.inner) for level in run.levels if level.unit == "token"}
    block = len(model.blocks) - 1
    for t in range(tokens.shape[1]):
        if starts[0, t]:  # a document begins with what rows begin with
            weights, windows = (
                {name: p.detach().clone() for name, p in model.named_parameters()},
                {"quick": [], "calm": []},
            )
        if targets[0, t] >= 0:
            own = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
            loss = functional_call(
                Plain(model), {f"model.{name}": w for name, w in own.items()}, (tokens[:, : t + 1], targets, starts, t)
            )
            total = total + loss.detach()
            slopes = dict(zip(own, torch.autograd.grad(loss, list(own.values()), allow_unused=True), strict=True))
            first = {name: first.get(name, 0.0) + (0.0 if slope is None else slope) for name, slope in slopes.items()}
            for level in periods:
                windows[level].append([slopes[names[p]][rows] for p, rows in slices(model, block)[level]])
        for level, (period, factor) in periods.items():
            if (t + 1) % period == 0 and t + 1 < tokens.shape[1]:
                if not windows[level]:
                    continue
                mean = [sum(parts) / len(windows[level]) for parts in zip(*windows[level], strict=True)]
                norm = torch.stack([part.square().sum() for part in mean]).sum().sqrt()
                step = inner.lr * factor * min(1.0, inner.clip / (float(norm) + 1e-6))
                for (parameter, rows), part in zip(slices(model, block)[level], mean, strict=True):
                    weights[names[parameter]][rows] -= step * part
                windows[level] = []
    return total, first


class Plain(nn.Module):
    """A network that learns nothing while it reads: the loss of one token."""

    def __init__(self, model: HopeInSequence) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, starts: Tensor, t: int) -> Tensor:
        model = self.model
        x, place = model.enter(tokens), model.scene(starts[:, : t + 1])
        for block in model.blocks:
            x, _ = block.mix(x, place)
            x = block.continuum(x)
        return model.head(x[t : t + 1], targets[:, t : t + 1])


def serial(run: Run) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of rows together, and of each row by hand."""
    model, rows = model_of(run), batch(run)
    chunked = model(*rows)
    slopes = torch.autograd.grad(chunked, list(model.parameters()))
    each = [by_hand(model, run, tuple(part[b : b + 1] for part in rows)) for b in range(rows[0].shape[0])]  # type: ignore[arg-type]
    firsts = [sum(first[name] for _, first in each) for name, _ in model.named_parameters()]
    return [chunked.detach(), *slopes], [sum(loss for loss, _ in each), *firsts]


@pytest.mark.parametrize("form", ["whole", "factors"])
@pytest.mark.parametrize(
    ("levels", "variant"),
    [(ONE, "independent"), (TWO, "independent"), (TWO, "sequential")],
    ids=["one", "two", "chain"],
)
def test_i10_by_chunks_is_token_by_token(levels: str, variant: str, form: str) -> None:
    """Rows together, chunks at once = each row alone, each token's gradient by itself (prequential losses); in a chain of
    levels each hears of the loss through those after it. So is the meta-gradient of the first order.
    """
    said = [levels, *BASE, f"model.variant={variant}"]
    chunked, separate = ranks(1, serial, tiny(*said, f"model.inner.form={form}"))[0]
    frozen = ranks(1, loss_of, tiny(*said, "model.inner.lr=0.0"))[0]
    torch.testing.assert_close(chunked, separate, rtol=1e-10, atol=1e-10)
    assert abs(float(chunked[0] - frozen)) > 1e-5 * float(frozen)


def loss_of(run: Run) -> Tensor:
    model = model_of(run)
    with torch.no_grad():
        return model(*batch(run))


def frozen_and_plain(run: Run) -> tuple[Tensor, Tensor, float]:
    """Losses, and how far apart the scores are that the head makes, of the largest."""
    model, rows = model_of(run), batch(run)
    heard: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: heard.append(model.head.logits(given[0])))
    with torch.no_grad():
        x = model.enter(rows[0])
        for block in model.blocks:
            x, _ = block.mix(x, model.scene(rows[2]))
            x = block.continuum(x)
        losses = model(*rows), model.head(x, rows[1])
        *still, plain = heard
        return *losses, float((torch.cat(still) - plain).abs().max() / plain.abs().max())


@pytest.mark.parametrize(
    "said", ["model.inner.lr=0.0", "model.writes=false", "levels=[{name: quick, period: 16, unit: token}]"]
)
def test_i11_row_16_what_does_not_move_is_the_frozen_model(said: str) -> None:
    """Bit for bit in one piece; in chunks of 4 tokens BLAS adds up in another order."""
    still, plain, apart = ranks(1, frozen_and_plain, tiny(TWO, *BASE, said))[0]
    assert apart <= (0 if said.startswith("levels") else 1e-14)
    assert torch.equal(still, plain) or (not said.startswith("levels") and abs(still - plain) <= 1e-14 * abs(plain))


def sgd_on_rows(run: Run) -> list[float]:
    """Differences between copies handed on from row to row and torch's SGD on the slow weights, after each of three rows."""
    model, rows = model_of(run), batch(run)
    (block,), state, found = [model.blocks[-1]], None, []
    continuum = block.continuum
    own = [continuum.up.weight.detach().clone(), continuum.down.weight.detach().clone()]
    for b in range(rows[0].shape[0]):
        one = tuple(part[b : b + 1] for part in rows)
        x = model.enter(one[0])
        for each in model.blocks[:-1]:
            x, _ = each(x, model.scene(one[2]))
        _, state = model.read(x.detach(), one[1], one[2], state and state._replace(mixers=[None]), hand_on=True)
        before = [continuum.up.weight.data.clone(), continuum.down.weight.data.clone()]
        continuum.up.weight.data, continuum.down.weight.data = own[0].clone(), own[1].clone()
        y, _ = block.mix(x.detach(), model.scene(one[2]))
        loss = model.head(continuum(y), one[1]) / max(1, int((one[1] >= 0).sum()))
        slopes = torch.autograd.grad(loss, [continuum.up.weight, continuum.down.weight])
        own = [w - run.model.inner.lr * g for w, g in zip(own, slopes, strict=True)]
        continuum.up.weight.data, continuum.down.weight.data = before
        learned = state.copies[0]["quick"]
        up = torch.cat([learned[part].change[0] for part in continuum.inward])
        found += [
            float((before[0] + up - own[0]).abs().max()),
            float((before[1] + learned["down"].change[0] - own[1]).abs().max()),
        ]
    return found


def test_i12_handed_on_from_row_to_row_it_is_sgd() -> None:
    """Over a corpus that is one document."""
    said = ["model.inner.clip=0", "model.inner.form=whole", "model.attention=causal"]
    run = tiny("levels=[{name: quick, period: 16, unit: token}]", *BASE, *said)
    assert max(ranks(1, sgd_on_rows, run)[0]) < 1e-12


def heard(run: Run) -> tuple[Tensor, Tensor]:
    """How much states of the tokens of a document, and of the one after it, differ where its third token does."""
    model, (tokens, targets, starts) = model_of(run), batch(run)
    starts = torch.zeros_like(starts)
    starts[:, [0, 9]] = True
    found: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    with torch.no_grad():
        for other in (tokens, torch.cat([tokens[:, :2], 1 + tokens[:, 2:3] % 120, tokens[:, 3:]], 1)):
            model(other, targets, starts)
    half = len(found) // 2
    apart = torch.cat(found[:half]) - torch.cat(found[half:])
    return apart[3:9].abs().max(), apart[9:].abs().max()


@pytest.mark.parametrize("form", ["whole", "factors"])
@pytest.mark.parametrize("variant", ["independent", "sequential"])
def test_a_document_hears_nothing_of_what_the_one_before_it_taught(variant: str, form: str) -> None:
    """Levels move after 4 and 8 tokens, the second document begins with the tenth: inside a chunk, and a window."""
    said = [TWO, *BASE, f"model.variant={variant}", f"model.inner.form={form}"]
    own, next_one = ranks(1, heard, tiny(*said))[0]
    assert own > 1e-3 and next_one == 0
    undivided = ranks(1, heard, tiny(*said, "model.attention=causal"))[0]
    shared = ranks(1, heard, tiny(*said, "model.inner.shared=true"))[0] if form == "whole" else undivided
    assert undivided[1] > 1e-3 and shared[1] > 1e-3


def meta(run: Run, step: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Directional derivatives of the loss, in full and by finite differences, and of the first order."""
    model, rows = model_of(run), batch(run)
    weights = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in weights]
    slopes = torch.autograd.grad(model(*rows), weights)
    exact = torch.stack([(g * way).sum() for g, way in zip(slopes, ways, strict=True)]).sum()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, way in zip(weights, ways, strict=True):
                p.add_(way, alpha=sign * step)
            losses.append(model(*rows))
            for p, way in zip(weights, ways, strict=True):
                p.add_(way, alpha=-sign * step)
    return exact, (losses[0] - losses[1]) / (2 * step), torch.stack([g.norm() for g in slopes])


MIXERS = {
    "attention": [],
    "delta": ["model.linear.chunk=4"],
    "linear": ["model.linear.chunk=4"],
    "written": ["model.written.chunk=4"],
    **dict.fromkeys(("titans", "titans_mac", "titans_mag", "titans_mal"), ["model.titans.chunk=2"]),
    "self_modifying": [
        "model.self_modifying.chunk=2",
        "model.self_modifying.maker_chunk=4",
        "model.self_modifying.clip=0.01",
    ],
}


@pytest.mark.parametrize("mixer", [*MIXERS][1:])
def test_v19_through_memories_that_write_between_a_level_and_its_loss(mixer: str) -> None:
    said = [TWO, *BASE, *MIXERS[mixer], f"model.mixer={mixer}", "model.inner.layers=2", "model.inner.meta=full"]
    exact, differences, _ = ranks(1, meta, tiny(*said), 1e-8)[0]  # unit keys bend sharply where keys are short
    assert float(exact) == pytest.approx(float(differences), rel=1e-5)


@pytest.mark.parametrize("form", ["whole", "factors"])
@pytest.mark.parametrize("layers", [1, 2])
def test_v19_the_full_meta_gradient_by_finite_differences(layers: int, form: str) -> None:
    said = [TWO, *BASE, f"model.inner.layers={layers}", f"model.inner.form={form}", "model.attention=causal"]
    exact, differences, norms = ranks(1, meta, tiny(*said, "model.inner.meta=full"))[0]
    assert float(exact) == pytest.approx(float(differences), rel=1e-6)
    first, _, first_norms = ranks(1, meta, tiny(*said))[0]
    assert abs(float(first - exact)) > 1e-5 * abs(float(exact))
    assert first_norms.isfinite().all() and norms.isfinite().all()


def causal(run: Run) -> tuple[bool, bool]:
    model, (tokens, targets, starts) = model_of(run), batch(run)
    later, some = tokens.clone(), targets.clone()
    later[:, 9:] = 1 + later[:, 9:] % 120
    some[:, 9:] = -1
    counted = targets.clone()
    counted[:, 8:] = -1  # losses of tokens before the disturbed ones and their targets
    with torch.no_grad():
        same = torch.equal(model(tokens, counted, starts), model(later, counted, starts))
        moves = torch.equal(model(tokens, targets, starts), model(later, targets, starts))
    return same, moves


def test_i16_no_token_reads_what_itself_or_a_later_one_wrote() -> None:
    assert ranks(1, causal, tiny(TWO, *BASE))[0] == (True, False)


LAYOUTS = {
    "tensor": (2, ["parallel.tensor=2"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "data": (2, []),
    "tensor-pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "context": (2, ["parallel.context=2"]),
    "tensor-context": (4, ["parallel.tensor=2", "parallel.context=2", "model.kv_heads=4"]),
    "pipeline-context": (4, ["parallel.pipeline=2", "parallel.context=2"]),
}
FORMS = {
    "independent": [],
    "sequential": ["model.variant=sequential"],
    "self_modifying": ["model.mixer=self_modifying", "model.self_modifying.chunk=4"],
    "gains": ["model.gains=true"],
    "full": ["model.inner.meta=full", "model.inner.layers=2", "model.attention=causal"],
    "full-one": ["model.inner.meta=full"],
    "delta": ["model.mixer=delta", "model.linear.chunk=4"],
}


CASES = [(layout, form) for layout in LAYOUTS for form in FORMS if form != "full-one"]
LEFT = [
    ("tensor-context", "full"),
    ("pipeline-context", "full-one"),
    ("tensor", "self_modifying"),
    ("pipeline", "self_modifying"),
    ("data", "sequential"),
    ("tensor", "gains"),
]
LEFT += [
    ("context", "self_modifying"),
    ("context", "delta"),
    ("tensor-context", "sequential"),
]


CASES = [case for case in CASES if not ("pipeline" in case[0] and case[1] == "full")]  # a stage has one layer
CASES += [("pipeline", "full-one"), ("pipeline-context", "full-one")]


@pytest.mark.parametrize(("layout", "form"), sampled(CASES, LEFT))
def test_layout_equals_one_process(layout: str, form: str) -> None:
    count, overrides = LAYOUTS[layout]
    shape = [each for each in overrides if each.startswith("model.")]
    said = [TWO, *BASE, *FORMS[form], *shape, "model.inner.clip=0.005"]
    loss, pieces = ranks(1, gradients, tiny(*said), torch.float64)[0]
    results = ranks(count, gradients, tiny(*said, *overrides), torch.float64)
    expected, actual = assemble([pieces]), assemble([result[1] for result in results])
    assert all(abs(result[0] - loss) < 1e-11 * loss for result in results)
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= 1e-11 * grad.norm(), name


def shared_loss(run: Run) -> Tensor:
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64)
    return model.forward_backward(micro_batches(run, 0, world.replica, world.replicas), True)[:2]


def test_mode_s_two_replicas_share_one_memory() -> None:
    """Two replicas of two rows each = one of four rows: copies move by the mean gradient of all sequences."""
    said = [TWO, *BASE, "model.inner.shared=true", "model.inner.lr=2.0", "train.global_batch=4"]
    one = ranks(1, shared_loss, tiny(*said, "train.micro_batch=4"))[0]
    two = ranks(2, shared_loss, tiny(*said, "train.micro_batch=2"))
    torch.testing.assert_close(two[0] + two[1], one, rtol=1e-11, atol=1e-11)
    parted = ranks(2, shared_loss, tiny(*said, "train.micro_batch=4", "parallel.context=2"))
    torch.testing.assert_close(parted[0] + parted[1], one, rtol=1e-11, atol=1e-11)
    apart = ranks(1, shared_loss, tiny(*said, "train.micro_batch=4", "model.inner.shared=false"))[0]
    assert abs(float(apart[0] - one[0])) > 1e-6 * float(one[0])


@pytest.mark.parametrize("meta", ["first_order", "full"])
def test_mode_s_gradients_of_two_replicas_are_those_of_one(meta: str) -> None:
    said = [TWO, *BASE, "model.inner.shared=true", f"model.inner.meta={meta}", "train.global_batch=4"]
    (_, pieces), *_ = ranks(1, gradients, tiny(*said, "train.micro_batch=4"), torch.float64)
    results = ranks(2, gradients, tiny(*said, "train.micro_batch=2"), torch.float64)
    expected, actual = assemble([pieces]), assemble([result[1] for result in results])
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= 1e-11 * grad.norm(), name


def streamed(run: Run) -> list[tuple[float, float]]:
    """Losses of three steps that hand one shared memory on, and of SGD on the same weights with the batches' gradients."""
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64)
    chunk = model.chunks[0]
    continuum = chunk.blocks[-1].continuum
    slow = [continuum.up.weight, continuum.down.weight]
    own, found = [w.detach().clone() for w in slow], []
    for seed in (1, 2, 3):
        (one,) = micro_batches(run, seed, 0, 1)
        mine = float(model.forward_backward([one], True)[0])
        kept = [w.data.clone() for w in slow]
        for w, value in zip(slow, own, strict=True):
            w.data = value.clone()
        x, place = chunk.enter(one[0]), chunk.scene(one[2])
        for block in chunk.blocks[:-1]:
            x, _ = block(x, place)
        x, _ = chunk.blocks[-1].mix(x, place)
        loss = chunk.head(continuum(x), one[1])
        slopes = torch.autograd.grad(loss / (one[1] >= 0).sum(), slow)
        own = [w - run.model.inner.lr * g for w, g in zip(own, slopes, strict=True)]
        for w, value in zip(slow, kept, strict=True):
            w.data = value
        found.append((mine, float(loss)))
    return found


def ordinary(run: Run) -> list[float]:
    """Losses of three steps of training: its optimizer, on the same batches."""
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64)
    optimizer, found = build_optimizer(run, model.leaves, world), []
    for step in (1, 2, 3):
        total = model.forward_backward(micro_batches(run, step, 0, 1), True)
        optimizer.step(step, total[2].long())
        found.append(float(total[0]))
    return found


STILL = (
    "match: [embed.weight, head.weight, norm.weight, 'blocks.0.*', 'blocks.1.mix.*', 'blocks.1.continuum.norm.weight']"
)


def test_row_17_a_shared_memory_that_moves_once_a_step_is_ordinary_training() -> None:
    """Mode S, one move a row, never reset: it is SGD on the batch, and a run of which the same weights move."""
    said = ["levels=[{name: quick, period: 16, unit: token}]", "model.layers=2", "model.inner.shared=true"]
    said += ["model.inner.clip=0", "model.inner.lr=0.7", "model.reset=never", "data.shuffle=false"]
    losses = ranks(1, streamed, tiny(*said, "train.global_batch=4", "train.micro_batch=4"))[0]
    assert all(mine == pytest.approx(theirs, rel=1e-12) for mine, theirs in losses)
    levels = f"levels=[{{name: quick, period: 1}}, {{name: still, period: 1, width: 0, frozen: true, {STILL}}}]"
    sgd = ["optim.name=sgd", "optim.matrix.momentum=0", "optim.lr=0.7", "optim.weight_decay=0", "optim.clip=0"]
    rest = [
        "model.layers=2",
        "optim.schedule=wsd",
        "optim.decay=0",
        "optim.warmup=0",
        "train.global_batch=4",
        "train.micro_batch=4",
    ]
    trained = ranks(1, ordinary, tiny(levels, *sgd, *rest))[0]
    assert trained == pytest.approx([mine for mine, _ in losses], rel=1e-12)
    assert len({round(loss, 9) for loss in trained}) == 3
    anew = ranks(1, streamed, tiny(*said[:-2], "train.global_batch=4", "train.micro_batch=4"))[0]
    assert abs(anew[2][0] - anew[2][1]) > 1e-6 * anew[2][1]


def hasty(run: Run) -> tuple[Tensor, Tensor]:
    """A loss at half the pace, and that at half the rate."""
    world = join(run.parallel, run.cluster, 0)
    losses = []
    for pace, rate in ((0.5, 0.8), (1.0, 0.4)):
        model = parallelize(replace(run, model=replace(run.model, inner=replace(run.model.inner, lr=rate))), world)
        model.pace(pace)
        losses.append(model.forward_backward(micro_batches(run, 0, 0, 1), False)[0])
    return losses[0], losses[1]


def test_the_inner_rate_rises_from_a_tenth_while_a_run_is_young() -> None:
    inner = tiny(TWO, "model.inner.warmup=0.1").model.inner
    assert [inner.pace(step, 100) for step in (1, 5, 10, 100)] == pytest.approx([0.19, 0.55, 1.0, 1.0])
    assert tiny(TWO, "model.inner.warmup=0").model.inner.pace(1, 100) == 1.0
    half, slow = ranks(1, hasty, tiny(TWO, *BASE))[0]
    assert torch.equal(half, slow)


def reached(run: Run) -> dict[int, dict[str, bool]]:
    """Tokens read -> level -> whether its copy has heard of token 1 by then."""
    model, (tokens, targets, starts) = model_of(run), batch(run)
    other, found = tokens.clone(), {}
    other[:, 1] = 1 + other[:, 1] % 120
    for count in (4, 8):
        copies = []
        for said in (tokens, other):
            x = model.enter(said[:, :count])
            for block in model.blocks[:-1]:
                x, _ = block(x, model.scene(starts[:, :count]))
            _, state = model.read(x.detach(), targets[:, :count], starts[:, :count], hand_on=True)
            copies.append(state.copies[-1])
        found[count] = {
            level: any(not same(fast, copies[1][level][part]) for part, fast in parts.items())
            for level, parts in copies[0].items()
        }
    return found


def same(one: Whole, other: Whole) -> bool:
    return one.change is other.change or (one.change is not None and torch.equal(one.change, other.change))


def test_row_18_a_token_is_first_seen_in_a_level_at_its_first_boundary() -> None:
    heard = ranks(1, reached, tiny(TWO, *BASE, "model.inner.form=whole"))[0]
    assert heard == {4: {"quick": True, "calm": False}, 8: {"quick": True, "calm": True}}


REFUSED = {
    "levels=[{name: a,period: 5,unit: token}]": "period=5 tokens does not divide data.sequence=16; 1, 2, 4, 8, 16",
    "levels=[{name: a,period: 2,width: 0.5},{name: b,period: 4,unit: token,width: 0.5}]": "so it comes before a (unit step)",
    "levels=[{name: a,period: 4,unit: token,width: 0.5},{name: b,period: 6,unit: token,width: 0.5}]": "divisibility chain",
    "model.variant=nested": "need model.variant=independent or sequential",
    "parallel.context=2 train.micro_batch=1": "need train.micro_batch=2: parallel.context=2 ranks trade tokens for rows",
    "model.inner.layers=2 parallel.pipeline=2": "must lie on the last pipeline stage, which holds 1 layers",
    "model.mixer=delta model.linear.chunk=8": "period=4 must be a multiple of model.linear.chunk=8",
    "model.inner.shared=true model.inner.form=factors": "needs model.inner.form=whole",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_does_not_fit_is_refused_on_the_login_node(overrides: str) -> None:
    with pytest.raises(UserError) as refusal:
        tiny(TWO, *BASE, *overrides.split(" ") if "levels" not in overrides else [overrides])
    assert REFUSED[overrides] in str(refusal.value)
