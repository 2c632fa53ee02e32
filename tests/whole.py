"""Putting the ranks' pieces of a tensor together again."""

import torch
from torch import Tensor

Pieces = dict[str, tuple[Tensor, int | None, int]]  # leaf name -> (local tensor, sharded axis, tensor-parallel rank)


def assemble(ranks: list[Pieces]) -> dict[str, Tensor]:
    """Whole tensors by leaf name; replicas of a piece must be equal bit for bit."""
    seen: dict[str, dict[int, Tensor]] = {}
    axes: dict[str, int | None] = {}
    for pieces in ranks:
        for name, (tensor, axis, rank) in pieces.items():
            place = rank if axis is not None else 0
            known = seen.setdefault(name, {}).setdefault(place, tensor)
            assert torch.equal(known, tensor), f"replicas of {name} differ"
            axes[name] = axis
    return {
        name: parts[0] if axes[name] is None else torch.cat([parts[r] for r in sorted(parts)], axes[name])
        for name, parts in seen.items()
    }
