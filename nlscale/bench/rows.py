"""Random rows for benches that need no corpus."""

import torch

from nlscale.config.run import Run
from nlscale.parallel.apply import MicroBatch


def random_rows(run: Run, count: int, device: torch.device) -> list[MicroBatch]:
    """`count` micro-batches of one document a row, the same at every call."""
    assert run.model.vocabulary is not None
    shape, generator, made = (run.train.micro_batch, run.data.sequence), torch.Generator().manual_seed(0), []
    for _ in range(count):
        tokens = torch.randint(0, run.model.vocabulary, shape, generator=generator).to(device)
        made.append((tokens, tokens.roll(-1, 1), torch.zeros(shape, dtype=torch.bool, device=device)))
    return made
