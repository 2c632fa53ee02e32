"""When a GPU's memory runs out: the snapshot in the logs says which line asked for it."""

from pathlib import Path

import pytest
import torch

from nlscale.config.read import read
from nlscale.runtime.folder import Folder
from nlscale.train.out_of_memory import explained, ran_out, remember

pytestmark = pytest.mark.gpu


def greedy() -> None:
    """Asks for more than there is."""
    held = [torch.empty(2**20, device="cuda")]
    held.append(torch.empty(2**42, dtype=torch.uint8, device="cuda"))


def test_a_snapshot_names_who_asked(tmp_path: Path) -> None:
    run = read("demo", ["log.allocations=1000", f"run.folder={tmp_path}"])
    remember(run.log.allocations)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            greedy()
    finally:
        assert ran_out(caught.value) and "snapshot:" in explained(caught.value, run, Folder(tmp_path), 0, 1)
        torch.cuda.memory._record_memory_history(enabled=None)
    assert b"greedy" in (tmp_path / "memory-rank-00000.pickle").read_bytes()
