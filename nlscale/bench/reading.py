"""What the next token costs: reading on, one token at a time, early in a row and late in it.

Attention looks at all keys before, so that its token costs more the further on it stands; a memory's token costs the same
everywhere, and what it holds of the row does not grow. One process, one thread, one row; means over tokens that hold one
end of every chunk, medians of rounds.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from nlscale.bench.memories import configure
from nlscale.bench.table import Row, at_most, beside, show
from nlscale.model.hope import Hope
from nlscale.model.reader import Reader, held, reader
from nlscale.parallel.apply import parallelize
from nlscale.runtime.quiet import quiet
from nlscale.runtime.world import join
from nlscale.testing import ranks

EARLY, LATE = 256, 4096  # tokens before those that are timed
COUNT, ROUNDS = 128, 3  # tokens that are timed at once; of each place
LONGEST = LATE + COUNT * ROUNDS
FLAT = 1.2  # a memory's late token / its early one, at most
PLAIN = "attention"
HOPE = ["model.mixer=self_modifying", "model.self_modifying.maker_chunk=128"]
LEARNS = "levels=[{name: quick, period: 128, unit: token, width: 0.25}, {name: fast, period: 1, width: 0.75}]"
ARMS: dict[str, list[str]] = {
    PLAIN: [],
    "attention over 512 tokens": ["model.window=512"],
    "attention over 512, a level moving every 128": ["model.window=512", LEARNS],
    "HOPE, chunks of 64, makers of 128": HOPE,
    "Titans": ["model.mixer=titans"],
    "Titans MAC": ["model.mixer=titans_mac"],
    "delta rule": ["model.mixer=delta"],
}


def seconds(reading: Reader, tokens: Tensor) -> float:
    """Of a token, read one by one, and what comes next predicted after each."""
    nowhere = torch.zeros(1, 1, dtype=torch.bool, device=tokens.device)
    total = tokens.new_zeros((), dtype=torch.float32)
    began = perf_counter()
    for token in tokens.unbind(1):
        total += reading.predicted(reading.read(token[:, None], nowhere)).sum()
    float(total)  # waits for the device
    return (perf_counter() - began) / tokens.shape[1]


def begun(model: Hope, tokens: Tensor) -> Reader:
    """A reader of these tokens."""
    reading = reader(model)
    for part in tokens.split(EARLY, 1):
        reading.read(part, torch.zeros_like(part, dtype=torch.bool))
    return reading


def timed(said: list[str]) -> tuple[float, float, float]:
    """Seconds of an early token and of a late one, and bytes that are held late. In a process of its own."""
    run = configure(["use.levels=plain", "model.attention=causal", *said], 1, LONGEST)
    model = parallelize(run, join(run.parallel, run.cluster, 0)).chunks[0]
    tokens = torch.randint(0, 256, (1, LONGEST), generator=torch.Generator().manual_seed(0)).to(model.cosine.device)
    places = [(begun(model, tokens[:, :place]), place) for place in (EARLY, LATE)]
    found: list[list[float]] = [[], []]
    for turn in range(ROUNDS):
        for (reading, place), times in zip(places, found, strict=True):
            first = place + turn * COUNT
            times.append(seconds(reading, tokens[:, first : first + COUNT]))
    late = [value for value in vars(places[1][0]).values() if value is not model]
    return median(found[0]), median(found[1]), float(held(late))


def apart(said: list[str]) -> tuple[float, float, float]:
    """`timed`, forked."""
    return ranks(1, timed, said, timeout=600)[0]  # type: ignore[no-any-return]


def table(measure: Callable[[list[str]], tuple[float, float, float]] = apart) -> list[Row]:
    """Of every arm: its late token against its early one, what it holds against attention."""
    found = {name: measure(said) for name, said in ARMS.items()}
    rows = []
    for name, (early, late, _) in found.items():
        row = beside if name == PLAIN else at_most
        limit = () if name == PLAIN else (FLAT,)
        rows.append(row(f"{name}: a token after {LATE:,}, and after {EARLY}", 1e3 * late, "ms", 1e3 * early, *limit))
    for name, (_, _, size) in found.items():
        rows.append(beside(f"{name}: held of a row of {LONGEST:,}", size / 2**20, "MiB", found[PLAIN][2] / 2**20))
    return rows


def main(target: str | None) -> int:
    """Prints the table; 0 if every target is kept."""
    quiet()
    return show("reading on, one token at a time; baseline: early in the row, then attention's", table(), target)
