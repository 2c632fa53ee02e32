"""What both sharders share: a group's leaves in flat memory, this rank's part of it, and the rules on that part.

Flat parameters are no leaves of autograd. A stored parameter that is one leaf moves into flat memory; a leaf that shares
its storage with other levels (slices of a feed-forward) is copied back after a gather.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nlscale.config.levels import Level
from nlscale.config.optim import Optim
from nlscale.config.run import Run
from nlscale.optim.layout import Flat, flats
from nlscale.optim.matrices import Part
from nlscale.optim.rules import bind
from nlscale.optim.shard import counted, parts, square
from nlscale.optim.tasks import state_names
from nlscale.optim.window import Windows, window_dtype
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World


class FlatShard:
    """A group's leaves, masters and rules on this rank (optim/shard.py has the seam)."""

    def __init__(
        self,
        level: Level,
        given: Sequence[Flat],
        memory: Sequence[Tensor],
        optim: Optim,
        windows: Windows,
        world: World,
    ) -> None:
        """`memory`: one tensor a flat, at least as long, that holds the weights of all replicas' parts."""
        self.level, self.flats, self.windows, self.world = level, list(given), windows, world
        self.leaves = [leaf for flat in self.flats for leaf, _ in flat.places]
        self.weights = [tensor[: flat.elements] for tensor, flat in zip(memory, self.flats, strict=True)]
        self.parts = [weights.chunk(world.copies)[world.copy] for weights in self.weights]
        self.arriving: list[dist.Work] = []
        self._attach()
        host = bool(optim.offload) and level.steps >= optim.offload
        self.rules = []
        for flat, own in zip(self.flats, self.parts, strict=True):
            master = own.detach().to(window_dtype(own.dtype), copy=True)
            matrices = [
                Part(span.start, (leaf.value.shape[0], leaf.value.shape[1]), leaf.shard, leaf)
                for leaf, _, span in parts(flat, world.copy, world.copies)
                if leaf.value.ndim == 2
            ]
            master = on_host(master) if host else master
            alone = not (host or flat.kind.nested or state_names(level))  # nobody but the rule changes the master
            given_to = (matrices, world.tensor, windows.inputs, own if alone else None)
            self.rules.append(bind(flat.kind, master, optim, level, *given_to))
        self.counted = [counted(flat, world) for flat in self.flats]
        self.whole = [
            sum(span.stop - span.start for span in spans)
            == sum(span.stop - span.start for _, _, span in parts(flat, world.copy, world.copies))
            for flat, spans in zip(self.flats, self.counted, strict=True)
        ]

    def _attach(self) -> None:
        """Moves whole parameters into flat memory; keeps the views that every gather goes through."""
        self.stored, self.moved = [], []
        for flat, weights in zip(self.flats, self.weights, strict=True):
            for (leaf, _), view in zip(flat.places, flat.views(weights), strict=True):
                if leaf.whole:
                    leaf.parameter.data = view
                else:
                    self.stored.append(leaf.value)
                    self.moved.append(view)

    def ring_bytes(self, element: int) -> int:
        """What one reduce-scatter or all-gather of all flats sends from this rank on a ring."""
        elements, replicas = sum(flat.elements for flat in self.flats), self.world.copies
        return elements * element * (replicas - 1) // replicas

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], rate: float, scale: float) -> Tensor:
        """Applies each flat's rule to this rank's part of `scale` x its gradients.

        Gives the squared norm of the change, of what counts here: a float64 scalar.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i, (rule, grad) in enumerate(zip(self.rules, grads, strict=True)):
            old = None if rule.tells and (self.whole[i] or not self.counted[i]) else self.before(i)
            told = rule.step(grad.to(rule.master.device), rate, scale)
            if old is not None:
                total += square([rule.master - old], [self.counted[i]]).to(total.device)
            elif told is not None and self.counted[i]:
                total += told.sum(dtype=torch.float64).to(total.device)
        return total

    def before(self, i: int) -> Tensor:
        """A master's values before an update: the weights that it was last published as, where these are exact."""
        rule, part = self.rules[i], self.parts[i]
        exact = part.dtype == rule.master.dtype and part.device == rule.master.device and rule.copy is None
        return part if exact else rule.master.clone()

    @torch.no_grad()
    def write(self, everything: bool = False) -> None:
        """Writes what this rank sends: masters that no rule wrote itself, or `everything`."""
        for part, rule in zip(self.parts, self.rules, strict=True):
            if everything or rule.copy is None:
                part.copy_(rule.master, non_blocking=True)

    @torch.no_grad()
    def gather(self) -> None:
        """Begins to send this rank's part of the weights to every replica."""
        self.write()
        for weights, part in zip(self.weights, self.parts, strict=True):
            self.arriving.append(dist.all_gather_into_tensor(weights, part, group=self.world.data, async_op=True))

    @torch.no_grad()
    def arrive(self) -> None:
        """Waits for `gather`, and copies slices to where the model computes with them."""
        if self.arriving:
            for work in self.arriving:
                work.wait()
            self.arriving = []
            self.publish()

    def publish(self) -> None:
        """Copies gathered weights into storage that several levels share."""
        if self.stored:
            torch._foreach_copy_(self.stored, self.moved)


def flats_of(level: Level, leaves: Sequence[Leaf], run: Run, world: World, align: int) -> list[Flat]:
    """The flats of a group under its level's rule."""
    nested = run.model.variant == "nested" and level.name != run.levels[-1].name
    return flats(leaves, level.optimizer or run.optim.name, nested, run.model, world.copies, align)


def on_host(master: Tensor) -> Tensor:
    """A copy in host memory; pinned where there is a device to copy from."""
    return torch.empty_like(master, device="cpu", pin_memory=master.is_cuda).copy_(master)


def flat_parameter(flat: Flat) -> nn.Parameter:
    """One parameter that holds the leaves where the flat places them."""
    first = flat.places[0][0].value
    values = torch.zeros(flat.elements, dtype=first.dtype, device=first.device)
    flat.fill(values, [leaf.value for leaf, _ in flat.places])
    return nn.Parameter(values)
