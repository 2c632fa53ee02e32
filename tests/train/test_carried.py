"""Memories that go on from row to row: two rows are one long row, at every layout; a resume takes them over."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nlscale.config.data import Data
from nlscale.config.errors import UserError
from nlscale.config.nesting import belongs
from nlscale.config.run import Run
from nlscale.data.card import load_card
from nlscale.data.loader import Loader
from nlscale.model.row_state import RowState, mapped
from nlscale.parallel.apply import parallelize
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.world import join
from nlscale.testing import ranks
from nlscale.train.loop import train
from nlscale.train.memories import named
from tests.corpus import small_run
from tests.exact import exact_loss
from tests.records import losses
from tests.sampled import sampled
from tests.tiny import micro_batches, tiny

NEVER = ["model.reset=never", "data.shuffle=false"]
CHUNKS = ["model.linear.chunk=4", "model.written.chunk=4", "model.titans.chunk=4", "model.self_modifying.chunk=2"]
CHUNKS += ["model.self_modifying.maker_chunk=4", "model.layers=2"]
ADAPTS = ["model.mixer=delta", "data.sequence=16", "model.inner.form=whole"]
QUICK = "levels=[{name: quick, period: 8, unit: token, width: 0.5}, {name: slow, period: 4, width: 0.5}]"


def streams(data: Data, replicas_rows: int, steps: int, start: int) -> tuple[int, np.ndarray]:
    """(replica, its rows of some steps)."""
    world = join_alone()
    loader = Loader(data, replicas_rows, world, follow=True)
    if start:
        loader.load_state_dict({"step": start, "order": loader.order})
    return world.replica, np.stack([next(loader) for _ in range(steps)])


def join_alone():  # noqa: ANN201
    run = tiny()
    return join(run.parallel, run.cluster, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_row_i_of_a_step_follows_row_i_of_the_step_before(workers: int, prepared: str) -> None:
    data, count = Data(path=prepared, sequence=32, shuffle=False, workers=workers), load_card(prepared).rows["train"]
    epoch = count // 4
    ((_, one),) = ranks(1, streams, data, 4, epoch + 2, 0)
    same_unit = (one[1:, :, 0] == one[:-1, :, -1]).mean()
    assert same_unit > 0.95, "rows overlap by a token where they follow one another, but at the corpus' end"
    assert len({row.tobytes() for row in one[:epoch].reshape(-1, 33)}) == len(
        {row.tobytes() for row in rows_in_order(prepared)[: epoch * 4]}
    )
    assert np.array_equal(one[epoch:, :3], one[:2, 1:]), "a stream goes on where the next one began"
    two = dict(ranks(2, streams, data, 4, 5, 3))
    assert np.array_equal(np.concatenate([two[0], two[1]], 1), one[3:8])


def rows_in_order(prepared: str) -> list[np.ndarray]:
    def read() -> list[np.ndarray]:
        loader = Loader(Data(path=prepared, sequence=32, shuffle=False), 1, join_alone())
        return [next(loader)[0] for _ in range(loader.steps_an_epoch)]

    return ranks(1, read)[0]


def summed_losses(run: Run, steps: int) -> torch.Tensor:
    """Sums of the losses of rows of 32 tokens, read in so many steps without a move of the weights: on the last stage."""
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64)
    exact_loss(model, world)
    with torch.no_grad():  # initial values are small: what is carried must be seen
        for leaf in model.leaves:
            if ".memory." in leaf.name or "out.weight" in leaf.name:
                leaf.value.mul_(8)
    whole = micro_batches(
        tiny(*SEEN, "data.sequence=32", f"train.micro_batch={run.train.micro_batch}"), 0, *place(world)
    )
    size, total = 32 // steps, torch.zeros(2, dtype=torch.float64)
    for first in range(0, 32, size):
        step = [tuple(part[:, first : first + size] for part in batch) for batch in whole]
        total += model.forward_backward(step, True)[:2]  # type: ignore[arg-type]
    return total if world.last_stage and world.tensor_rank == 0 else torch.zeros_like(total)


def owners(run: Run) -> set[tuple[str, int, str]]:
    """Of every tensor that a stage hands on, by its key in a checkpoint."""
    world = join(run.parallel, run.cluster, 0)
    (carried,) = parallelize(run, world).carried
    return {belongs(f"memories/{name}", run) for name, *_ in named(carried, carried.open()[0])}


OWNERS = {
    "delta": {("memory", 1, "token")},
    "written": {("memory", 1, "token")},
    "titans_mac": {("memory", 4, "token")},
    "titans_mal": {("memory", 4, "token")},
    "self_modifying": {("memory.main", 2, "token"), ("memory.makers", 4, "token")},
    "attention": set(),
}


@pytest.mark.parametrize("mixer", OWNERS)
def test_row_10_every_state_is_of_a_learner_with_a_period_of_tokens(mixer: str) -> None:
    tail = {("convolution", 1, "token")} if mixer not in ("titans_mac", "written", "attention") else set()
    run = tiny(*SEEN, *NEVER, QUICK, f"model.mixer={mixer}", "model.inner.form=whole")
    assert ranks(1, owners, run)[0] == OWNERS[mixer] | tail | {("quick.copy", 8, "token")}
    assert belongs("weights/blocks.1.continuum.quick.up.weight", run) == ("quick", 1, "step")
    assert belongs("windows/1/0/blocks.1.continuum.slow.up.weight", run) == ("slow.window", 1, "step")


def place(world) -> tuple[int, int]:  # noqa: ANN001
    return world.replica, world.replicas


SEEN = [*CHUNKS, "train.global_batch=4", "train.micro_batch=2"]
# attention, which sees its own row from its begin, hears nothing
ALONE = ["model.window=1", "model.titans.persistent=0"]
MIXERS = {
    "linear": ["model.mixer=linear"],
    "delta": ["model.mixer=delta"],
    "written": ["model.mixer=written", *ALONE],
    "titans": ["model.mixer=titans"],
    "titans_mac": ["model.mixer=titans_mac"],
    "titans_mag": ["model.mixer=titans_mag", *ALONE],
    "titans_mal": ["model.mixer=titans_mal", *ALONE],
    "self_modifying": ["model.mixer=self_modifying"],
    "delta-loops": ["model.mixer=delta", "model.loops=2"],
    "delta-in-sequence": ["model.mixer=delta", QUICK, "model.inner.form=whole", "model.inner.lr=0.5"],
    "self_modifying-shared": [
        "model.mixer=self_modifying",
        QUICK,
        "model.inner.shared=true",
        "model.variant=sequential",
        "train.micro_batch=4",
    ],
}
LAYOUTS = {
    "one": (1, []),
    "tensor": (2, ["parallel.tensor=2"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "context": (2, ["parallel.context=2"]),
    "data": (2, ["train.micro_batch=1"]),
}
EXCEPT = {("delta-loops", "pipeline")}
EXCEPT |= {("self_modifying-shared", layout) for layout in ("pipeline", "context", "data")}


@pytest.mark.parametrize(
    "mixer", sampled(MIXERS, ("linear", "written", "titans", "titans_mal", "delta-loops", "self_modifying-shared"))
)
def test_two_rows_are_one_long_row_at_every_layout(mixer: str) -> None:
    said = [*SEEN, *MIXERS[mixer]]
    long = ranks(1, summed_losses, tiny(*said, "data.sequence=32"), 1)[0]
    anew = ranks(1, summed_losses, tiny(*said, "data.sequence=16"), 2)[0]
    assert abs(float(anew[0] - long[0])) > 1e-7 * float(long[0]), "what is carried changes nothing"
    for layout, (count, overrides) in LAYOUTS.items():
        if (mixer, layout) not in EXCEPT:
            run = tiny(*said, *NEVER, "data.sequence=16", *overrides)
            halves = sum(ranks(count, summed_losses, run, 2))
            torch.testing.assert_close(halves, long, rtol=1e-12, atol=0, msg=lambda m, at=layout: f"{at}: {m}")


@pytest.mark.parametrize(
    ("count", "overrides"),
    [(1, ["train.recompute=block"]), (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"])],
    ids=["recompute", "interleaved"],
)
def test_two_rows_are_one_long_row_where_blocks_run_again_or_in_turn(count: int, overrides: list[str]) -> None:
    said = [*SEEN, "model.mixer=titans", "model.layers=4", "train.micro_batch=1"]
    long = ranks(1, summed_losses, tiny(*said, "data.sequence=32"), 1)[0]
    halves = sum(ranks(count, summed_losses, tiny(*said, *NEVER, "data.sequence=16", *overrides), 2))
    torch.testing.assert_close(halves, long, rtol=1e-12, atol=0)


MOVES = {
    "tensor2-data2 to pipeline2": (
        ["model.mixer=self_modifying", "model.self_modifying.chunk=8", QUICK],
        (4, ["parallel.tensor=2"]),
        (2, ["parallel.pipeline=2"]),
    ),
    "pipeline2 to tensor2": (
        ["model.mixer=delta", "model.linear.chunk=8", QUICK],
        (2, ["parallel.pipeline=2"]),
        (2, ["parallel.tensor=2"]),
    ),
    "context2 to data4": (
        ["model.mixer=titans_mac", "model.titans.chunk=8"],
        (2, ["parallel.context=2"]),
        (4, ["train.micro_batch=1"]),
    ),
    "context2 to tensor2": (
        ["model.mixer=delta", "model.linear.chunk=8", QUICK],
        (2, ["parallel.context=2"]),
        (2, ["parallel.tensor=2"]),
    ),
    "data2 to context2-tensor2": (
        ["model.mixer=delta", "model.linear.chunk=8"],
        (2, []),
        (4, ["parallel.context=2", "parallel.tensor=2"]),
    ),
}


@pytest.mark.parametrize("move", sampled(MOVES, set(MOVES) - {"data2 to context2-tensor2"}))
def test_memories_are_taken_over_by_another_layout(move: str, prepared: str, tmp_path: Path) -> None:
    said, (before, first), (after, second) = MOVES[move]
    common = [*NEVER, *said, "model.layers=2", "train.steps=14", "optim.lr=0.01"]
    alone = small_run(prepared, tmp_path / "alone", *common)
    ranks(1, train, alone)
    ranks(before, train, small_run(prepared, tmp_path / "moved", *common, *first, "train.stop_at=7"))
    moved = small_run(prepared, tmp_path / "moved", *common, *second)
    ranks(after, train, moved)
    assert losses(moved) == pytest.approx(losses(alone), rel=2e-4)
    hashes = [
        [line["data/token_hash"] for line in read_lines(Folder(Path(run.folder)).metrics) if "train/loss" in line]
        for run in (alone, moved)
    ]
    assert hashes[0] == hashes[1]


def refused(run: Run) -> tuple[list[bool], list[bool]]:
    """By micro-batch (two chunks), whether the step moved its memory, and whether it is finite; the second's loss is not."""
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world)
    chunk = model.chunks[0]
    model.forward_backward(micro_batches(run, 0, *place(world)), True)
    before = [mapped(lambda _, part: part.clone(), "", state) for state in model.carried[0].open()]
    head, calls = chunk.head.summed, []

    def spoilt(*given: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return head(*given) * (float("nan") if len(calls) > 2 else 1.0)

    chunk.head.summed = spoilt
    model.forward_backward(micro_batches(run, 1, *place(world)), True)
    moved, finite = [], []
    for old, new in zip(before, model.carried[0].open(), strict=True):
        seen: list[tuple[bool, bool]] = []
        mapped(lambda _, a, b, seen=seen: seen.append((not torch.equal(a, b), bool(b.isfinite().all()))), "", old, new)
        moved.append(any(m for m, _ in seen))
        finite.append(all(f for _, f in seen))
    return moved, finite


def test_rows_without_a_finite_loss_leave_the_memory_as_it_was() -> None:
    run = tiny(*SEEN, *NEVER, "model.mixer=self_modifying", QUICK, "data.sequence=16")
    assert ranks(1, refused, run)[0] == ([True, False], [True, True])


def overflown(run: Run) -> tuple[bool, list[float]]:
    """Whether memories are finite after a row whose last write is not, and the micro-batches refused after it."""
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world)
    chunk, refusals = model.chunks[0], []
    begin = chunk.onward

    def spoilt(batch: tuple, before: RowState | None = None, hand_on: bool = False) -> tuple:
        output, left = begin(batch, before, hand_on)
        return output, mapped(lambda _, part: part * (float("inf") if world.tensor_rank == 0 else 1.0), "", left)

    chunk.onward = spoilt  # type: ignore[method-assign]
    model.forward_backward(micro_batches(run, 0, *place(world)), True)
    chunk.onward = begin  # type: ignore[method-assign]
    for seed in (1, 2):
        refusals.append(float(model.forward_backward(micro_batches(run, seed, *place(world)), True)[3]))
    sound: list[bool] = []
    for state in model.carried[0].open():
        mapped(lambda _, part: sound.append(bool(part.isfinite().all())), "", state)
    return all(sound), refusals


@pytest.mark.parametrize(("count", "overrides"), [(1, []), (2, ["parallel.tensor=2"])], ids=["one", "tensor"])
def test_a_write_that_no_loss_has_seen_does_not_spoil_a_stream(count: int, overrides: list[str]) -> None:
    run = tiny(*SEEN, *NEVER, "model.mixer=titans", "data.sequence=16", *overrides)
    assert all(result == (True, [0.0, 0.0]) for result in ranks(count, overflown, run))


def strangers(run: Run, others: list[Run]) -> list[str]:
    """What is said of states of another width, dtype, number of layers and kind, and of those of other models."""
    world = join(run.parallel, run.cluster, 0)
    chunk, said = parallelize(run, world).chunks[0], []
    state, rows = chunk.begin(2), micro_batches(run, 0, *place(world))[0]
    wrong = [
        mapped(lambda _, part: part[:, :1], "", state),
        mapped(lambda _, part: part.double(), "", state),
        state._replace(mixers=state.mixers[:1]),
        state._replace(mixers=[None, None]),
        *(parallelize(other, world).chunks[0].begin(2) for other in others),
    ]
    for other in wrong:
        with pytest.raises(ValueError, match="state") as refusal:
            chunk.onward(rows, other)
        said.append(str(refusal.value))
    chunk.onward(rows, state)
    return said


def test_a_state_of_another_model_or_dtype_is_refused() -> None:
    """Linear and delta memories, and those of Titans, are tensors of the same shapes."""
    run = tiny(*SEEN, "model.mixer=delta", "data.sequence=16")
    width, dtype, layers, kind, linear, quick = ranks(
        1, strangers, run, [tiny(*SEEN, "model.mixer=linear", "data.sequence=16"), tiny(*SEEN, *ADAPTS, QUICK)]
    )[0]
    assert "a state of (2, 1, 8, 8) torch.float32 was given; (2, 4, 8, 8) torch.float32 would work" in width
    assert "torch.float64 was given" in dtype and "state.mixers.0.state" in dtype
    assert "state.mixers: the state is another model's: list of 1 where this one has list of 2" in layers
    assert "another model's: NoneType where this one has Matrix" in kind
    assert "state.mixer: the state is another model's: linear where this one has delta" in linear
    assert "state.copies: the state is another model's: list of 1 where this one has list of 0" in quick


@pytest.mark.parametrize("mixer", ["titans", "titans_mag", "titans_mal", "self_modifying"])
def test_a_state_of_kin_is_refused(mixer: str) -> None:
    """Of MAC, or of the same mixer with a momentum that this one has not."""
    own = ["model.mixer=self_modifying", "model.self_modifying.momentum=false"]
    run = tiny(*SEEN, *(own if mixer == "self_modifying" else [f"model.mixer={mixer}"]), "data.sequence=16")
    kin = "self_modifying" if mixer == "self_modifying" else "titans_mac"
    said = ranks(1, strangers, run, [tiny(*SEEN, f"model.mixer={kin}", "data.sequence=16")])[0][-1]
    wanted = "momentum: the state is another model's: Memories where this one has NoneType"
    assert (wanted if kin == mixer else f"{kin} where this one has {mixer}") in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ["train.precision=bf16"],
            r"the checkpoint holds \(4, 4, 3, 8\) torch.float32, this run's model has .*bfloat16",
        ),
        (["train.global_batch=8"], "memories of 4 rows a step; train.global_batch=4 would work"),
        (
            ["model.mixer=linear"],
            "holds another network: model.mixer=delta, here model.mixer=linear; model.mixer=delta would work",
        ),
        (["model.reset=row"], "model.reset=row, but the checkpoint's rows were taken with never"),
    ],
)
def test_a_checkpoint_of_other_memories_is_refused(change: list, words: str, prepared: str, tmp_path: Path) -> None:
    common = ["model.mixer=delta", "model.linear.chunk=8", "model.layers=1", *NEVER]
    ranks(1, train, small_run(prepared, tmp_path, *common, "train.stop_at=2"))
    with pytest.raises(RuntimeError, match=words):
        ranks(1, train, small_run(prepared, tmp_path, *common, *change))


REFUSED = {
    "model.mixer=attention": "needs a model.mixer with a memory, or levels with unit: token",
    "model.attention=causal": "needs model.attention=document: a memory's initial state learns where documents begin",
    "data.shuffle=true": "needs data.shuffle=false",
    "model.inner.form=factors": "model.inner.form=whole",
    "data.sequence=24": "data.sequence=16 or 32: level long moves every 16 tokens",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_go_on_is_refused_on_the_login_node(override: str) -> None:
    levels = "levels=[{name: quick,period: 8,unit: token,width: 0.5},{name: long,period: 16,unit: token,width: 0.5}]"
    said = [] if override == "model.mixer=attention" else [levels]
    with pytest.raises(UserError) as refusal:
        tiny("model.mixer=delta", "model.linear.chunk=8", *NEVER, *said, override)
    assert REFUSED[override] in str(refusal.value)
