"""Beyond the window: what a row said longer ago than attention can see (Nested Learning's long-context claim, in small).

A row tells pairs of a key and a value, goes on with filler for several windows, then says every key again; what was its
value? Two layers whose attention sees a window of 16 tokens hear of at most 30 tokens back, so without a memory they guess.
Levels that move inside the row can learn the pairs as they read. Rows are new at every step; all arms train on distances of
four windows, and are asked at greater ones, too.
"""

from collections.abc import Sequence
from statistics import mean

import torch

from nlscale.bench.drill import Rows, alone, right, side_by_side, trained
from nlscale.bench.memories import inside
from nlscale.bench.table import Row, show
from nlscale.config.read import read
from nlscale.runtime.quiet import quiet

KEYS, VALUES, FILLER, PAIRS = 16, 16, 8, 8
WINDOW, NEAR, FAR = 16, 64, (64, 128, 256)  # tokens: what attention sees; from telling to asking, in training and after
ROWS, STEPS, SEEDS = 32, 500, (1, 2)
AFTER, SEQUENCE = 2 * WINDOW, 320  # tokens from the first question on; of the longest row, in whole periods
MODEL = (
    *("use.levels=plain", "model.layers=2", "model.width=64", "model.heads=2", "model.kv_heads=2", "model.hidden=256"),
    *(f"model.vocabulary={KEYS + VALUES + FILLER}", "model.attention=causal", f"data.sequence={SEQUENCE}"),
    *("optim.lr=0.003", "optim.weight_decay=0", "optim.warmup=0.1", "optim.schedule=wsd", "optim.decay=0.2"),
    *("model.tied=false", "train.precision=fp32", "parallel.tensor=1", "cluster.threads=1"),
    *(f"train.micro_batch={ROWS}", f"train.global_batch={ROWS}"),
)
SEES = f"model.window={WINDOW}"


def learning(*periods: int) -> list[str]:
    """Attention over the window, and levels that move every so many tokens, in the last layer; the fastest are widest."""
    shares = [0.5 ** min(n + 1, len(periods) - 1) for n in range(len(periods))]
    return [SEES, inside(*periods, shares=shares), "model.inner.lr=1.0", "model.inner.clip=0"]


HOPE = ["model.mixer=self_modifying", "model.self_modifying.chunk=16"]
WINDOWED, SHOWN = "attention over the window", ("attention over the row", "self-modifying Titans")
ARMS: dict[str, list[str]] = {
    WINDOWED: [SEES],
    "and one level moving every 16 tokens": learning(16),
    "and one level moving every 32": learning(32),
    "and levels moving every 16 and 32": learning(16, 32),
    "and levels moving every 16, 32 and 64": learning(16, 32, 64),
    SHOWN[0]: [],
    SHOWN[1]: [*HOPE, "model.self_modifying.rate=0.1", "model.self_modifying.keep=0.999"],
}
GUESSED, MORE = 0.10, 0.20  # the window's share of right answers at most, and what memory adds at least


def told(rows: int, far: int, generator: torch.Generator) -> Rows:
    """Tokens and targets (B, far + AFTER): pairs, filler that says its place, the pairs in another order, filler."""
    length = far + AFTER
    said = (torch.arange(length + 1) % FILLER + KEYS + VALUES).expand(rows, -1).clone()
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    pairs = torch.stack([keys, KEYS + torch.randint(VALUES, (rows, PAIRS), generator=generator)], -1)
    order = torch.rand(rows, PAIRS, generator=generator).argsort(1)
    said[:, : 2 * PAIRS] = pairs.flatten(1)
    said[:, far : far + 2 * PAIRS] = pairs.gather(1, order[..., None].expand_as(pairs)).flatten(1)
    return said[:, :-1].contiguous(), said[:, 1:].contiguous()


def learnt(seed: int, overrides: Sequence[str], steps: int = STEPS) -> list[float]:
    """Shares of right answers at each distance of FAR, after training from nothing at the nearest."""
    quiet()
    run, generator = read("demo", [*MODEL, f"train.seed={seed}", *overrides]), torch.Generator().manual_seed(seed)
    found = []
    with alone(run, steps) as (model, optimizer):
        trained(model, optimizer, steps, lambda _: told(ROWS, NEAR, generator))
        for far in FAR:
            good = right(model, told(256, far, torch.Generator().manual_seed(0)))
            found.append(float(good[:, far : far + 2 * PAIRS : 2].double().mean()))
    return found


def main(target: str | None) -> int:
    """Prints the table; 0 if the window guesses and memory inside the row does not."""
    found = {}
    jobs = {(name, seed): (seed, said) for seed in SEEDS for name, said in ARMS.items()}
    for (name, seed), shares in side_by_side(learnt, jobs):
        found[name, seed] = shares
        print(f"{name}, seed {seed}: " + ", ".join(f"{share:.1%}" for share in shares), flush=True)
    title = f"right answers after {', '.join(map(str, FAR))} tokens, of a window of {WINDOW}; guessed: {1 / VALUES:.1%}"
    return show(title, table(found), target)


def table(found: dict[tuple[str, int], list[float]]) -> list[Row]:
    """Means over seeds by arm and distance; at the distance of training the arms are held to their targets."""
    shares = {name: [mean(each) for each in zip(*(found[name, s] for s in SEEDS), strict=True)] for name in ARMS}
    least = shares[WINDOWED][0] + MORE
    table = []
    for name, values in shares.items():
        for far, value in zip(FAR, values, strict=True):
            said, ok = "", True
            if far == NEAR and name == WINDOWED:
                said, ok = f"<= {GUESSED}", value <= GUESSED
            elif far == NEAR and name not in SHOWN:
                said, ok = f">= {least:.3f}", value >= least
            table.append(Row(f"{name}, {far} tokens", value, "share", None, None, said, ok))
    return table
