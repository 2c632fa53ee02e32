"""The nested variant's second order: the gradient of slow copies through the fast steps that began at them (spec 2.4).

    w_0 = slow copy;   w_{j+1} = (1 - rate decay) w_j - rate grad L_j(w_j);   J = sum_j L_j(w_j) / tokens

L_j is the loss of the steps between two moves of the fast level, all other weights as they are at the slower boundary.
The slow copy moves by the slower level's rate times dJ/dw_0. It is the two-level instance of meta-learned initial states
(transfer by initialisation; MAML is the same with another outer loss). One process holds all of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from nlscale.config.levels import Level, due
from nlscale.config.run import Run
from nlscale.optim.build import Optimizer
from nlscale.optim.levels import decays
from nlscale.optim.nested import SLOW
from nlscale.optim.schedule import level_decay, level_rate
from nlscale.parallel.apply import MicroBatch, Parallelized
from nlscale.runtime.leaf import Leaf

Weights = dict[str, Tensor]


class SecondOrder:
    """Keeps the micro-batches of the slower windows, and differentiates through the fast steps at their boundaries."""

    def __init__(self, run: Run, model: Parallelized, optimizer: Optimizer) -> None:
        self.run, self.optimizer = run, optimizer
        (self.network,) = model.chunks
        self.names = {parameter: name for name, parameter in self.network.named_parameters()}
        self.leaves = {leaf.name: leaf for leaf in model.leaves}
        self.kept: list[Sequence[MicroBatch]] = []  # of the last steps, as many as the slowest window has

    def before(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Call when backward of `step` is done and its levels have not moved: gives the optimizer the slow steps."""
        levels = self.run.levels
        self.kept = [*self.kept, batches][-levels[-1].period :]
        for fast, slower in zip(levels, levels[1:], strict=False):
            if due(slower, step) and len(self.kept) >= slower.period:
                rate = level_rate(self.run.optim, slower, step, self.optimizer.steps)
                gradients = self.gradient(fast, self.kept[-slower.period :], step)
                self.optimizer.anchors.gradients |= {name: rate * g for name, g in gradients.items()}

    def gradient(self, fast: Level, window: Sequence[Sequence[MicroBatch]], step: int) -> Weights:
        """dJ/dw_0 by leaf name; `window`: the micro-batches of each step of the slower window that ends at `step`."""
        start = {leaf.name: copy.clone().requires_grad_() for leaf, copy in self.slow_copies(fast)}
        with sdpa_kernel(SDPBackend.MATH):  # the backend that can be differentiated twice
            gradients = torch.autograd.grad(self.objective(fast, start, window, step), list(start.values()))
        return dict(zip(start, gradients, strict=True))

    def objective(self, fast: Level, weights: Weights, window: Sequence[Sequence[MicroBatch]], step: int) -> Tensor:
        """J: a scalar that can be differentiated through every fast step. Micro-batches whose loss is not finite count for
        nothing, as in the steps that were taken.
        """
        optim, losses, tokens, first = self.run.optim, [], 0.0, step - len(window)
        for begin in range(0, len(window), fast.period):
            loss, count = self.loss(weights, [batch for each in window[begin : begin + fast.period] for batch in each])
            losses.append(loss)
            tokens += count
            if not count:
                continue
            rate = level_rate(optim, fast, first + begin + fast.period, self.optimizer.steps)
            slopes = torch.autograd.grad(loss / count, list(weights.values()), create_graph=True)
            weights = {
                name: weight * (1 - rate * level_decay(optim, fast) * decays(name)) - rate * slope
                for (name, weight), slope in zip(weights.items(), slopes, strict=True)
            }
        return torch.stack(losses).sum() / max(1.0, tokens)

    def loss(self, weights: Weights, batches: Sequence[MicroBatch]) -> tuple[Tensor, float]:
        """Summed loss of the network with these weights in place of the level's, and its targets."""
        given = {name: parameter.detach() for parameter, name in self.names.items()}
        stored: dict[nn.Parameter, list[tuple[int, Tensor]]] = {}
        for name, weight in weights.items():
            leaf = self.leaves[name]
            stored.setdefault(leaf.parameter, []).append((leaf.start, weight))
        for parameter, parts in stored.items():  # a chain's stored parameter holds leaves of one level, row after row
            rows = torch.cat([weight for _, weight in sorted(parts, key=lambda part: part[0])])
            given[self.names[parameter]] = rows.to(parameter.dtype)
        scored = [(functional_call(self.network, given, batch), float((batch[1] >= 0).sum())) for batch in batches]
        nothing = torch.stack([0 * weight.sum() for weight in weights.values()]).sum()
        finite = [(loss, count) for loss, count in scored if bool(loss.isfinite())]
        return torch.stack([nothing, *(loss for loss, _ in finite)]).sum(), sum(count for _, count in finite)

    def slow_copies(self, level: Level) -> list[tuple[Leaf, Tensor]]:
        """The slow copy of each leaf of a level."""
        shards = self.optimizer.movers[level.name].shards
        found = [(flat, rule) for shard in shards for flat, rule in zip(shard.flats, shard.rules, strict=True)]
        return [
            (leaf, view)
            for flat, rule in found
            if flat.kind.nested
            for (leaf, _), view in zip(flat.places, flat.views(rule.state[SLOW]), strict=True)
        ]
