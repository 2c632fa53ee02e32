"""Reading on, on one GPU: what kernels say of a row that comes token by token, or in parts, they say of it at once."""

import pytest
import torch

from nlscale.model.reader import reader
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join, leave
from tests.tiny import tiny

pytestmark = pytest.mark.gpu
LIMIT = 2e-2  # relative norm: products are tf32
CHUNKS = ["model.linear.chunk=16", "model.titans.chunk=16", "model.self_modifying.chunk=16"]
CHUNKS += ["model.self_modifying.maker_chunk=32", "data.sequence=96", "model.width=128", "model.layers=2"]
CHUNKS += ["model.self_modifying.rate=0.1", "model.self_modifying.keep=0.999"]


@pytest.mark.parametrize("mixer", ["attention", "delta", "titans", "titans_mac", "self_modifying"])
def test_a_row_in_parts_is_the_row_at_once(mixer: str) -> None:
    run = tiny(*CHUNKS, f"model.mixer={mixer}", f"model.titans.rate={0.1 if mixer == 'titans' else 0.02}")
    world = join(run.parallel, run.cluster, 0)
    try:
        whole = parallelize(run, world)
        with torch.no_grad():  # what is written must be seen: without it, less than half of this is left
            for leaf in whole.leaves:
                if leaf.name.split(".")[-1] in ("up", "down") or "mix.out.weight" in leaf.name:
                    leaf.value.mul_(8)
        model = whole.chunks[0]
        tokens = torch.randint(1, 128, (2, 96), generator=torch.Generator().manual_seed(0)).to(world.device)
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[0, 40] = True
        said = []
        for parts in ([96], [40, 1, 1, 1, 30, 23], [1] * 96):
            reading, found, first = reader(model, 2), [], 0
            for count in parts:
                span = slice(first, first + count)
                found.append(reading.predicted(reading.read(tokens[:, span], starts[:, span])))
                first += count
            said.append(torch.cat(found))
        for other in said[1:]:
            assert float((other - said[0]).norm() / said[0].norm()) <= LIMIT
    finally:
        leave()
