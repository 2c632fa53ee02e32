"""Two hops in one block: what memories that write their own keys and values are for.

A row names pairs of symbols, a b and b c, of two chains in any order; then it asks every a for its b (one hop) and for its c
(two hops). A block whose keys and values are given looks up one pair: its own two hops are guesses, one of two ends. One
whose memories write the makers of keys and values, too, can have a pair change what a later pair is stored under, or what it
stands for. The parts of HOPE are left out one by one, as in the paper's ablation (Table 6); one block, memories moving every
token, trained on rows that are new at every step.
"""

from collections.abc import Sequence
from statistics import mean, median

import torch

from nlscale.bench.drill import Rows, alone, apart, right, side_by_side, trained
from nlscale.bench.table import Row, show
from nlscale.config.read import read
from nlscale.runtime.quiet import quiet

SYMBOLS, CHAINS, ROWS, STEPS = 8, 2, 64, 2500
TOKENS = 6 * CHAINS
MODEL = (
    *("use.levels=plain", "model.layers=1", "model.width=64", "model.heads=2", "model.kv_heads=2", "model.hidden=128"),
    *(f"model.vocabulary={4 * SYMBOLS + 1}", "model.attention=causal", "model.tied=false", f"data.sequence={TOKENS}"),
    *("model.self_modifying.chunk=1", "model.self_modifying.maker_chunk=1", "model.self_modifying.rate=1.0"),
    *("model.self_modifying.keep=0.999", "model.self_modifying.momentum=false"),
    *("model.self_modifying.convolution=2", "optim.weight_decay=0", "optim.lr=0.005", "optim.warmup=0.1"),
    *("optim.schedule=wsd", "optim.decay=0.1", "train.precision=fp32", "parallel.tensor=1", "cluster.threads=1"),
    *(f"train.micro_batch={ROWS}", f"train.global_batch={ROWS}"),
)
WHOLE = "the whole rule"
ARMS = {
    WHOLE: "model.self_modifying.written=[key,value,rate,keep,main]",
    "without erasing (DGD)": "model.self_modifying.erase=false",
    "keys' memory never written": "model.self_modifying.written=[value,rate,keep,main]",
    "values' memory never written": "model.self_modifying.written=[key,rate,keep,main]",
}
SEEDS = (1, 2, 3)
WANTED, WORTH = 0.95, 0.05  # share of right second hops, and what a part is worth of it: median and mean of seeds


def chains(rows: int, generator: torch.Generator) -> Rows:
    """Tokens and targets (B, T): pairs as source and target symbols, then each chain's head asked twice.

    Symbols as sources, as targets, nothing to say, heads asked for one hop, for two.
    """
    names = torch.rand(rows, SYMBOLS, generator=generator).argsort(1)[:, : 3 * CHAINS].view(rows, CHAINS, 3)
    pairs = torch.cat([names[:, :, :2], names[:, :, 1:]], 1)
    order = torch.rand(rows, 2 * CHAINS, generator=generator).argsort(1)
    told = pairs.gather(1, order[..., None].expand(-1, -1, 2)) + torch.tensor([0, SYMBOLS])
    asked = names.gather(1, torch.rand(rows, CHAINS, generator=generator).argsort(1)[..., None].expand(-1, -1, 3))
    nothing, heads = torch.full((rows, 4 * CHAINS), 2 * SYMBOLS), asked[..., 0] + 2 * SYMBOLS + 1
    tokens = torch.cat([told.flatten(1), heads, heads + SYMBOLS], 1)
    return tokens, torch.cat([nothing, asked[..., 1] + SYMBOLS, asked[..., 2] + SYMBOLS], 1)


def learnt(seed: int, overrides: Sequence[str], steps: int = STEPS) -> tuple[float, float]:
    """Shares of right answers after one hop and after two, on rows of the same kind, after training from nothing."""
    quiet()
    run, generator = read("demo-hope", [*MODEL, f"train.seed={seed}", *overrides]), torch.Generator().manual_seed(seed)
    with alone(run, steps) as (model, optimizer):
        trained(model, optimizer, steps, lambda _: chains(ROWS, generator))
        found = right(model, chains(1024, torch.Generator().manual_seed(0))).double().mean(0)
    return float(found[-2 * CHAINS : -CHAINS].mean()), float(found[-CHAINS:].mean())


def main(target: str | None) -> int:
    """Prints the table; 0 if the whole rule takes both hops, and each part is worth something."""
    found = {}
    jobs = {(name, seed): (seed, [said]) for seed in SEEDS for name, said in ARMS.items()}
    for (name, seed), (one, two) in side_by_side(learnt, jobs):
        found[name, seed] = one, two
        print(
            f"{name}, seed {seed}: {two:.1%} after two hops, {one:.1%} after one", flush=True
        )  # should it be cut short
    title = "right answers after two hops (one of two ends guessed: 50 %); baseline: after one"
    return show(title, table(found), target)


def table(found: dict[tuple[str, int], tuple[float, float]]) -> list[Row]:
    """Every arm with every seed, then what is held to a target."""
    seeds = [
        Row(f"{name}, seed {seed}", two, "share", one, None, "", True) for (name, seed), (one, two) in found.items()
    ]
    return [*seeds, *(row(name, found) for name in ARMS)]


def row(name: str, found: dict[tuple[str, int], tuple[float, float]]) -> Row:
    """Over the seeds: the whole rule's median, and the mean of an arm without a part, which falls behind the whole's."""
    ones, twos = ([found[name, seed][hop] for seed in SEEDS] for hop in (0, 1))
    if name == WHOLE:
        two = median(twos)
        return Row(f"{name}, median", two, "share", median(ones), None, f">= {WANTED}", two >= WANTED)
    whole = [found[WHOLE, seed][1] for seed in SEEDS]
    (less, error), most = apart(twos, whole), mean(whole) - WORTH
    unit = f"share ({less:+.3f}, standard error {error:.3f})"
    return Row(f"{name}, mean", mean(twos), unit, mean(ones), None, f"<= {most:.3f}", mean(twos) <= most)
