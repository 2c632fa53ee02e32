"""Reading on, token by token or in parts, says what the network says to the whole row; levels learn as they read."""

import pytest
import torch
from torch import Tensor

from nlscale.config.run import Run
from nlscale.model.hope import Hope
from nlscale.model.reader import LearningReader, Reader, held, reader
from nlscale.testing import ranks
from tests.model.test_mixing import CHUNKS, built
from tests.tiny import tiny

LEARNING = (
    "levels=[{name: quick, period: 4, width: 0.25, unit: token}, {name: calm, period: 8, width: 0.25, unit: token}, "
    "{name: slow, period: 2, width: 0.5}]"
)
INSIDE = [LEARNING, "model.inner.lr=0.5", "model.inner.layers=1"]
CASES = {
    "attention": [],
    "window and loops": ["model.window=5", "model.loops=2"],
    "hope": ["model.mixer=self_modifying"],
    "learning": INSIDE,
    "learning, two layers": [*INSIDE, "model.layers=4", "model.inner.layers=2", "model.variant=sequential"],
    "learning as pairs": [*INSIDE, "model.inner.form=factors"],
    "learning together": [*INSIDE, "model.inner.shared=true"],
    "learning, window": [*INSIDE, "model.window=3", "model.attention=causal"],
    "learning beside a memory": [*INSIDE, "model.mixer=titans_mag", "model.window=6"],
    "learning beside HOPE": [*INSIDE, "model.mixer=self_modifying"],
}
PARTS = ([1] * 16, [3, 1, 8, 4], [8, 8], [5, 11], [16])


def row() -> tuple[Tensor, Tensor]:
    """Tokens of two rows, and where their documents begin."""
    tokens = torch.randint(1, 128, (2, 17), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, 16, dtype=torch.bool)
    starts[0, [0, 6]] = starts[1, 9] = True
    return tokens, starts


def at_once(model: Hope, tokens: Tensor, starts: Tensor) -> Tensor:
    """Scores (T, B, V) of the whole rows as training and evaluation compute them: what the head is given."""
    heard: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, given: heard.append(given[0].detach()))
    with torch.no_grad():
        model(tokens[:, :-1], tokens[:, 1:], starts)
    hook.remove()
    return model.head.norm(torch.cat(heard)).detach() @ model.head.weight.detach().t()


def apart(run: Run) -> list[float]:
    """Largest differences, by the parts that the rows come in."""
    model, _ = built(run)
    tokens, starts = row()
    whole, found = at_once(model, tokens, starts), []
    for parts in PARTS:
        reading, said, first = reader(model, 2), [], 0
        assert type(reading) is (LearningReader if any(level.unit == "token" for level in run.levels) else Reader)
        for count in parts:
            span = slice(first, first + count)
            said.append(reading.predicted(reading.read(tokens[:, :16][:, span], starts[:, span])))
            first += count
        found.append(float((torch.cat(said) - whole).abs().max() / whole.abs().max()))
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_parts_is_what_is_said_of_rows(case: str) -> None:
    (found,) = ranks(1, apart, tiny(*CHUNKS, *CASES[case]))
    assert len(found) == len(PARTS) and max(found) < 1e-12


def read_at_once(run: Run) -> Tensor:
    """Scores (T, B, V) of the rows in one part."""
    reading, (tokens, starts) = reader(built(run)[0], 2), row()
    return reading.predicted(reading.read(tokens[:, :16], starts))


def test_levels_learn_as_a_reader_reads_unless_nothing_may_be_written() -> None:
    """Scores of tokens within the first chunk are the same, those after it are not."""
    learning, still = (
        ranks(1, read_at_once, tiny(*CHUNKS, *INSIDE, *said))[0] for said in ([], ["model.writes=false"])
    )
    moved = (learning - still).abs().amax((1, 2))
    assert moved[:4].max() == 0 and moved[4:].min() > 1e-6


def refusal(run: Run, tokens: int) -> str:
    """What a reader says to a row of so many tokens."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        reader(built(run)[0], 1).read(torch.ones(1, tokens).long(), torch.zeros(1, tokens).bool())
    return str(error.value)


def test_what_a_reader_refuses() -> None:
    long = "17 tokens of a row were read; the model was built for 16"
    full = "a network with model.inner.meta=full keeps all of a row; first_order reads the same"
    assert ranks(1, refusal, tiny(*CHUNKS), 17) == [long]
    assert ranks(1, refusal, tiny(*CHUNKS, *INSIDE, "model.inner.meta=full"), 4) == [full]


def growth(run: Run) -> list[int]:
    """Bytes that a reader holds of its rows after 6 and after 14 tokens, which are inside a chunk, and after 8 and 16."""
    model, _ = built(run)
    tokens, starts = row()
    reading, sizes = reader(model, 2), {}
    for first in range(16):
        reading.read(tokens[:, first : first + 1], starts[:, first : first + 1])
        sizes[reading.past] = held(reading.left)
    return [sizes[count] for count in (6, 14, 8, 16)]


@pytest.mark.parametrize(
    ("said", "grows"), [("", True), ("model.window=5", False), ("model.mixer=self_modifying", False)]
)
def test_keys_and_values_grow_with_the_row_a_window_and_a_memory_do_not(said: str, grows: bool) -> None:
    ((inside, later, whole, last),) = ranks(1, growth, tiny(*CHUNKS, *said.split()))
    assert inside > 0 and whole > 0
    assert (later > inside) is grows and (last > whole) is grows
    assert inside > whole or "mixer" not in said  # what waits is held
