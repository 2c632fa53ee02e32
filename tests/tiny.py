"""A run small enough to compute exactly, and its rows."""

import torch
from torch import Tensor

from nlscale.config.read import read
from nlscale.config.run import Run

LEVELS = (
    "levels=[{name: fast, period: 1, width: 0.5}, "
    "{name: slow, period: 2, width: 0.25}, {name: long, period: 4, width: 0.25}]"
)
SMALL = [
    "model.layers=4",
    "model.width=32",
    "model.heads=4",
    "model.kv_heads=2",
    "model.hidden=64",
    "model.vocabulary=128",
]
TRAIN = ["data.sequence=16", "train.global_batch=8", "train.micro_batch=2", "train.precision=fp32"]
TRAIN += ["parallel.tensor=1", "cluster.threads=1"]


def tiny(*overrides: str) -> Run:
    """Four layers of width 32, three levels."""
    return read("demo", [LEVELS, *SMALL, *TRAIN, *overrides])


def micro_batches(run: Run, step: int, replica: int, replicas: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The micro-batches of one replica at a step: random tokens, documents, and some targets that count for nothing."""
    generator = torch.Generator().manual_seed(step)
    rows, size = run.train.global_batch, run.train.micro_batch
    tokens = torch.randint(0, 128, (rows, run.data.sequence + 1), generator=generator)
    starts, targets = tokens[:, :-1] < 12, tokens[:, 1:].clone()
    targets[tokens[:, :-1] > 120] = -1
    first = range(replica * size, rows, replicas * size)
    return [(tokens[i : i + size, :-1], targets[i : i + size], starts[i : i + size]) for i in first]
