"""When a level's gradients cross ranks (spec 3.10): at its boundary, every step, or inside a node every step.

    defer         window: float32, whole, on each replica        one reduction a boundary
    eager         sums: float32, this rank's part                 one reduction a step
    hierarchical  sums: float32, a node's part of each replica's  reduction inside nodes a step, between them a boundary

Reduction is linear, so all three give the same mean. What stays open between steps differs, and with it what a
checkpoint finds: parts, each a piece of the window's total.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.optim.partial import sum_partials
from nlscale.optim.shard import Fragment, Sharder, parts
from nlscale.optim.window import Windows, window_dtype
from nlscale.runtime.world import World


class Open(Protocol):
    """Sums that are open between steps, as a checkpoint finds them."""

    part: int  # which part of the total this rank holds pieces of ...
    parts: int  # ... of how many
    partial: bool  # whether pieces may be partial over tensor-parallel ranks or pipeline ends too

    def open(self) -> Iterator[Fragment]:
        """Views of what this rank holds of the open window, as {"window": values}."""


class Policy(Open, Protocol):
    """One shard's way from windows to this rank's part of their sum."""

    bytes_a_step: int  # that this rank sends on a ring at every step ...
    bytes_a_close: int  # ... and at the boundary, before the new weights are gathered

    def add(self) -> None:
        """Ends a step."""

    def close(self) -> list[Tensor]:
        """This rank's part of the sum over the whole window and all replicas; the window is empty after."""


class Defer:
    """Windows stay where backward left them until the boundary."""

    partial = True

    def __init__(self, shard: Sharder, windows: Windows, world: World) -> None:
        self.shard, self.windows, self.part, self.parts = shard, windows, world.copy, world.copies
        self.close = shard.total
        self.bytes_a_step, self.bytes_a_close = 0, shard.bytes_a_reduce

    def add(self) -> None:
        """Nothing crosses ranks before the boundary."""

    def open(self) -> Iterator[Fragment]:
        """The leaves' windows, whole."""
        for leaf in self.shard.leaves:
            window = self.windows.of(leaf)
            if not window.is_contiguous():
                raise ValueError(f"the window of {leaf.name} is cut")
            yield Fragment(leaf, 0, {"window": window.view(-1)})


class Eager:
    """Every step's sum is reduced to its owner."""

    partial = False

    def __init__(self, shard: Sharder, windows: Windows, world: World) -> None:
        self.shard, self.world, self.part, self.parts = shard, world, 0, 1
        like = [rule.master for rule in shard.rules]
        self.sums = [torch.zeros_like(m, dtype=window_dtype(m.dtype), device=world.device) for m in like]
        self.bytes_a_step, self.bytes_a_close = shard.bytes_a_reduce, 0

    @torch.no_grad()
    def add(self) -> None:
        """Adds the step's total to this rank's part."""
        torch._foreach_add_(self.sums, self.shard.total())

    def close(self) -> list[Tensor]:
        """The sums so far."""
        sums, self.sums = self.sums, [torch.zeros_like(each) for each in self.sums]
        return sums

    def open(self) -> Iterator[Fragment]:
        """This rank's part."""
        for flat, sums in zip(self.shard.flats, self.sums, strict=True):
            for leaf, start, span in parts(flat, self.world.copy, self.world.copies):
                yield Fragment(leaf, start, {"window": sums[span]})


class Hierarchical:
    """Every step's sum is scattered inside the node; the nodes' sums meet at the boundary.

    Replica m n + r is rank r of node m. Part m n + r of a flat belongs to it; inside node m, rank r keeps the node's sum
    of parts r, n + r, 2 n + r ... until the boundary sends each to its owner.
    """

    partial = False

    def __init__(self, shard: Sharder, windows: Windows, world: World) -> None:
        self.shard, self.windows, self.world = shard, windows, world
        self.near, self.far = world.near, world.far
        self.part, self.parts = world.copy // self.near.size(), self.far.size()
        self.sums = [
            torch.zeros(self.parts, flat.elements // world.copies, dtype=windows_like(shard), device=world.device)
            for flat in shard.flats
        ]
        near, size = self.near.size(), shard.leaves[0].value.element_size()
        elements = sum(flat.elements for flat in shard.flats)
        self.bytes_a_step = elements * size * (near - 1) // near
        self.bytes_a_close = elements // near * size * (self.parts - 1) // self.parts

    @torch.no_grad()
    def add(self) -> None:
        """Adds the node's sum of this step: one reduce-scatter inside the node."""
        sum_partials(self.windows, self.shard.leaves, self.world)
        wire = self.shard.leaves[0].value.dtype
        for flat, sums in zip(self.shard.flats, self.sums, strict=True):
            whole = torch.zeros(flat.elements, dtype=wire, device=sums.device)
            values = [self.windows.of(leaf) for leaf, _ in flat.places]
            flat.fill(whole, values)
            torch._foreach_zero_(values)
            by_rank = whole.view(self.parts, self.near.size(), -1).transpose(0, 1).contiguous()
            kept = torch.empty_like(sums, dtype=wire)
            dist.reduce_scatter_tensor(kept.view(-1), by_rank.view(-1), group=self.near)
            sums += kept

    @torch.no_grad()
    def close(self) -> list[Tensor]:
        """The sum over nodes of the part that this rank owns."""
        totals = []
        for sums in self.sums:
            wire = sums.to(self.shard.leaves[0].value.dtype)
            total = torch.empty_like(wire[0])
            dist.reduce_scatter_tensor(total, wire.view(-1), group=self.far)
            totals.append(total.to(sums.dtype))
            sums.zero_()
        return totals

    def open(self) -> Iterator[Fragment]:
        """The node's sums that this rank keeps."""
        for flat, sums in zip(self.shard.flats, self.sums, strict=True):
            for node in range(self.parts):
                owner = node * self.near.size() + self.world.copy % self.near.size()
                for leaf, start, span in parts(flat, owner, self.world.copies):
                    yield Fragment(leaf, start, {"window": sums[node][span]})


def windows_like(shard: Sharder) -> torch.dtype:
    """The dtype of sums."""
    return window_dtype(shard.leaves[0].value.dtype)


POLICIES: dict[str, type[Defer] | type[Eager] | type[Hierarchical]] = {
    "defer": Defer,
    "eager": Eager,
    "hierarchical": Hierarchical,
}
