"""What the parts of HOPE are worth: small models trained with and without each, on the same rows from the same numbers.

The paper's ablation (Table 6) in small: 2 seeds of 1,000 steps of 2,048 tokens of Python's standard library, one block of
width 96, memories that move every 16 tokens. A part is worth what the held-out loss rises by without it. Trains as many
models at a time as there are cores; about an hour on two.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from nlscale.bench.table import Row, show
from nlscale.data.write import Preparation, prepare
from nlscale.runtime.folder import Folder, read_lines

SEEDS = (1, 2)
MODEL = [
    *("model.layers=1", "model.width=96", "model.heads=3", "model.kv_heads=3", "model.hidden=256"),
    *("model.self_modifying.chunk=16", "model.self_modifying.maker_chunk=16", "model.self_modifying.rate=0.06"),
    *("parallel.tensor=1", "cluster.nproc=1", "cluster.threads=1"),
    *("train.steps=1000", "train.global_batch=8", "train.micro_batch=8", "train.evaluate_rows=256"),
    *("train.evaluate_interval=0", "checkpoint.interval=1000000", "log.wandb=disabled"),
]
INSIDE = ["use.levels=inside"]
WHOLE, CONTINUUM = "the whole rule", "a continuum inside the row"
ARMS: dict[str, list[str]] = {
    WHOLE: [],
    "without erasing (DGD)": ["model.self_modifying.erase=false"],
    "keys' memory never written": ["model.self_modifying.written=[value,rate,keep,main]"],
    "values' memory never written": ["model.self_modifying.written=[key,rate,keep,main]"],
    "without momentum": ["model.self_modifying.momentum=false"],
    "one level that moves every step": ["use.levels=plain"],
    CONTINUUM: INSIDE,
    "the same levels, which do not move there": [*INSIDE, "model.inner.lr=0"],
}
BESIDE = ("without momentum", "one level that moves every step")  # shown, without a target


def trained(overrides: list[str], folder: str) -> float:
    """Held-out loss of one run, by the command itself."""
    said = [*MODEL, *overrides, f"run.folder={folder}", f"run.name={Path(folder).name}"]
    done = subprocess.run(
        [sys.executable, "-m", "nlscale.cli", "train", "demo-hope", *said], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{folder} ended with {done.returncode}\n{done.stderr[-2000:]}{done.stdout[-2000:]}")
    return float([line["eval/loss"] for line in read_lines(Folder(Path(folder)).metrics) if "eval/loss" in line][-1])


def main(target: str | None) -> int:
    """Prints the table; 0 if every part is worth something on average over the seeds."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        data = f"{folder}/data"
        prepare(Preparation(sources=("stdlib",), out=data, sequence=256, tokeniser="bpe:512", held_out=0.05))
        jobs = {
            (name, seed): pool.submit(
                trained,
                [*said, f"data.path={data}", f"train.seed={seed}"],
                f"{folder}/{place}-{seed}",
            )
            for seed in SEEDS
            for place, (name, said) in enumerate(ARMS.items())
        }
        losses = {key: job.result() for key, job in jobs.items()}
    title = f"What the parts of HOPE are worth, means of {len(SEEDS)} seeds (differences by seed)"
    return show(title, [row(name, losses) for name in ARMS], target)


def row(name: str, losses: dict[tuple[str, int], float]) -> Row:
    """An arm's held-out loss, and whether the part that it goes without is worth anything."""
    found = mean(losses[name, seed] for seed in SEEDS)
    if name in (WHOLE, CONTINUUM):
        return Row(name, found, "held-out loss", None, None, "", True)
    base = CONTINUUM if name == list(ARMS)[-1] else WHOLE
    worth = [losses[name, seed] - losses[base, seed] for seed in SEEDS]
    label = f"{name} ({', '.join(f'{each:+.4f}' for each in worth)})"
    baseline, wanted = mean(losses[base, seed] for seed in SEEDS), name not in BESIDE
    return Row(label, found, "held-out loss", baseline, None, "above" if wanted else "", not wanted or mean(worth) > 0)
