"""Weights that several ranks hold, compared by their hashes: a rank that computed otherwise is named before it spreads."""

import socket
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World

CHUNK = 2**20  # words that are hashed at once
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ODD, MIX = 0x9E3779B1, 0x5851F42D4C957F2D  # any odd constants: of a word's place, and from leaf to leaf


def weights_hash(values: Iterable[Tensor]) -> Tensor:
    """A hash of tensors' bits, an int64 scalar on their device, computed there."""
    total: Tensor | None = None
    for value in values:
        words = value.detach().reshape(-1).view(WORDS[value.element_size()])
        mine = torch.zeros((), dtype=torch.int64, device=value.device)
        for start in range(0, len(words), CHUNK):
            part = words[start : start + CHUNK].to(torch.int64)
            place = torch.arange(start, start + len(part), device=value.device)
            mine += (part * (place * ODD * 2 + 1)).sum()  # wraps round
        total = mine if total is None else total * MIX + mine
    return torch.zeros((), dtype=torch.int64) if total is None else total


def odd_ranks(found: Sequence[tuple[int, int]]) -> list[int]:
    """Of (class, hash) by rank: the ranks whose hash is not their class's most frequent one; all, where none is."""
    odd = []
    for kind in {kind for kind, _ in found}:
        members = [(rank, value) for rank, (other, value) in enumerate(found) if other == kind]
        counts = Counter(value for _, value in members).most_common()
        if len(counts) > 1:
            usual = counts[0][0] if counts[0][1] > counts[1][1] else None
            odd += [rank for rank, value in members if value != usual]
    return sorted(odd)


def differing(leaves: Sequence[Leaf], world: World) -> list[str]:
    """Ranks whose weights are not those of the other ranks that hold the same, each with its host. A collective."""
    split = weights_hash(leaf.value for leaf in leaves if leaf.shard is not None)
    whole = weights_hash(leaf.value for leaf in leaves if leaf.shard is None)
    stage, tensor = world.pipeline_rank, world.tensor_rank
    mine = torch.tensor([stage, tensor, 0, 0], dtype=torch.int64, device=world.device)
    mine[2], mine[3] = split, whole
    every = [torch.zeros_like(mine) for _ in range(world.size)]
    dist.all_gather(every, mine)
    rows = [each.tolist() for each in every]
    tensors = world.tensor.size()
    odd = odd_ranks([(row[0] * tensors + row[1], row[2]) for row in rows])
    odd = sorted({*odd, *odd_ranks([(row[0], row[3]) for row in rows])})
    if not odd:
        return []
    hosts: list[str] = [""] * world.size
    dist.all_gather_object(hosts, socket.gethostname())
    return [f"rank {rank} (host {hosts[rank]})" for rank in odd]
