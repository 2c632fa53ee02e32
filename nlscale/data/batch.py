"""A batch: what a step computes on, and its hash, which no layout changes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HASH_BITS = 40  # sums of hashes over thousands of ranks stay exact in float64


@dataclass(frozen=True)
class Batch:
    """Rows of one replica: tokens and their targets (B, T) int64, starts (B, T) true at a document's first token."""

    tokens_BT: Tensor
    targets_BT: Tensor
    starts_BT: Tensor

    def micro(self, rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Micro-batches of `rows` rows."""
        parts = (part.split(rows) for part in (self.tokens_BT, self.targets_BT, self.starts_BT))
        return list(zip(*parts, strict=True))


def to_batch(rows_BT1: np.ndarray, document: int, device: torch.device) -> Batch:
    """Rows of T + 1 tokens -> a batch; the target of a token is the one that follows it. Void rows have none (-1)."""
    ids = torch.from_numpy(rows_BT1.astype(np.int64)).to(device, non_blocking=True)
    inputs = ids[:, :-1].clamp(min=0)
    return Batch(inputs, ids[:, 1:].contiguous(), inputs == document)


def token_hash(rows_BT1: np.ndarray) -> int:
    """A hash of a set of rows below 2**HASH_BITS: the sum of the rows' hashes, so their order does not matter.

    Void rows add nothing.
    """
    rows_BT1 = rows_BT1[rows_BT1[:, 0] >= 0]
    position = np.arange(1, rows_BT1.shape[1] + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        weights = position * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
        rows = (rows_BT1.astype(np.uint64) + np.uint64(1)) @ weights
        rows = (rows ^ (rows >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        rows ^= rows >> np.uint64(32)
        return int(rows.sum(dtype=np.uint64) & np.uint64(2**HASH_BITS - 1))
