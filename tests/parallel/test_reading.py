"""Tensor-parallel ranks read on together: each holds its heads' memories, and all say what one process says."""

import pytest
import torch
from torch import Tensor

from nlscale.config.run import Run
from nlscale.model.reader import reader
from nlscale.testing import ranks
from tests.model.test_mixing import CHUNKS, built
from tests.model.test_reader import INSIDE, row
from tests.tiny import tiny

CASES = {
    "attention": ["model.tied=true"],
    "hope": ["model.mixer=self_modifying"],
    "titans_mac": ["model.mixer=titans_mac"],
    "learning": INSIDE,
}


def said(run: Run) -> Tensor:
    """Scores (T, B, V) of rows that come in parts."""
    model, _ = built(run)
    tokens, starts = row()
    reading, found = reader(model, 2), []
    for first, last in ((0, 3), (3, 4), (4, 12), (12, 16)):
        found.append(reading.predicted(reading.read(tokens[:, first:last], starts[:, first:last])))
    return torch.cat(found)


@pytest.mark.parametrize("case", CASES)
def test_two_tensor_parallel_ranks_read_what_one_reads(case: str) -> None:
    one = ranks(1, said, tiny(*CHUNKS, *CASES[case]))[0]
    two = ranks(2, said, tiny(*CHUNKS, *CASES[case], "parallel.tensor=2"))
    assert torch.equal(*two)
    # a vocabulary-parallel loss, which levels learn from, is of float32
    torch.testing.assert_close(two[0], one, rtol=1e-11, atol=1e-8 if case == "learning" else 1e-12)
