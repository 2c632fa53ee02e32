"""A corpus small enough for tests, and a run on it."""

import json
from pathlib import Path

import numpy as np

from nlscale.config.read import read
from nlscale.config.run import Run

LEVELS = (
    "levels=[{name: fast, period: 1, width: 0.5}, "
    "{name: slow, period: 4, width: 0.25}, {name: long, period: 8, width: 0.25}]"
)
MODEL = [
    "model.layers=2",
    "model.width=32",
    "model.heads=4",
    "model.kv_heads=2",
    "model.hidden=64",
    "model.vocabulary=384",
]
TRAIN = [
    "train.steps=30",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.precision=fp32",
    "train.evaluate_rows=0",
]
REST = ["data.sequence=32", "parallel.tensor=1", "checkpoint.interval=15", "optim.lr=0.002"]
REST += ["cluster.threads=1", "log.wandb=disabled"]
REST += ["log.peak_flops=1e10"]  # a figure that is given need not be measured
WORDS = ["memory", "learns", "at", "its", "own", "pace", "slow", "fast", "level", "window"]


def write_corpus(folder: Path, seed: int = 0, documents: int = 300, space: str = " ") -> Path:
    """JSON lines of random words."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    lines = [json.dumps({"text": space.join(random.choice(WORDS, 40))}) for _ in range(documents)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def small_run(data: str, folder: Path, *overrides: str) -> Run:
    """Thirty steps of a four-layer model of width 32; its folder is opened."""
    fixed = [LEVELS, *MODEL, *TRAIN, *REST, f"data.path={data}", f"run.folder={folder}"]
    for name in ("checkpoints", "plots"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return read("demo", [*fixed, *overrides])
