"""Whether the loader ever keeps the model waiting: tokens a second of both, in one process."""

import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from nlscale.bench.step import Contestant
from nlscale.bench.table import at_least, show
from nlscale.config.read import read
from nlscale.data.batch import to_batch
from nlscale.data.loader import Loader
from nlscale.data.write import Preparation, prepare
from nlscale.runtime.world import join

SECONDS = 4.0


def main(target: str | None) -> int:
    """Prints the table; 0 if the target is kept."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "stdlib"))
        card = prepare(Preparation(sources=("stdlib",), out=out, sequence=256, tokeniser="bytes"))
        run = read("demo", ["parallel.tensor=1", f"data.path={out}", "train.micro_batch=16"])
        run = replace(run, model=replace(run.model, vocabulary=4096))
        world = join(run.parallel, run.cluster, 0)
        loader = Loader(run.data, run.train.global_batch, world)
        next(loader)
        began, steps = perf_counter(), 0
        while perf_counter() - began < SECONDS:
            batch = to_batch(next(loader), card.document, torch.device("cpu"))
            steps += 1
        loaded = steps * batch.tokens_BT.numel() / (perf_counter() - began)
        contestant = Contestant(run, world)
        contestant.step(batch.tokens_BT, batch.targets_BT)
        began, steps = perf_counter(), 0
        while perf_counter() - began < SECONDS:
            contestant.step(batch.tokens_BT, batch.targets_BT)
            steps += 1
        learned = steps * batch.tokens_BT.numel() / (perf_counter() - began)
        rows = [at_least("loader / demo model on all cores", loaded, "tokens/s", learned, 20)]
        return show("rows of 257 tokens from local shards, one process", rows, target)
