"""Update rules on whole matrices: Muon, M3, delta momentum, DMGD (spec 2.10), also where tensor parallelism cuts them.

A replica owns whole matrices (optim/layout.py), so only tensor parallelism cuts one: along its rows (axis 0) or its
columns (axis 1). A product that contracts the cut axis is a sum over ranks: one all-reduce, exact. The other way is to
hand whole matrices around, each computed on one rank. Spec 3.7 gives the volume of both; the smaller one is taken.

K matrices of one shape are computed as a batch; O rows, I columns, this rank's part of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.optim import Matrix
from nlscale.optim.newton_schulz import newton_schulz
from nlscale.optim.split import Split
from nlscale.runtime.leaf import Leaf

EPS = 1e-7
BATCH = 2**26  # elements of this rank that are computed at once


@dataclass(frozen=True)
class Part:
    """A matrix in a rank's part of a flat: where it begins, its local shape, the axis that tensor parallelism cuts."""

    start: int
    shape: tuple[int, int]
    axis: int | None
    leaf: Leaf | None = None

    def of(self, flat: Tensor) -> Tensor:
        """Its view of a tensor laid out like the part."""
        return flat[self.start : self.start + self.shape[0] * self.shape[1]].view(self.shape)


Direction = Callable[[Tensor, dict[str, Tensor], Split, int], Tensor]


class Matrices:
    """Applies a rule to all matrices of a part, shape by shape."""

    def __init__(
        self,
        master: Tensor,
        state: dict[str, Tensor],
        direction: Direction,
        decay: float,
        parts: Sequence[Part],
        group: dist.ProcessGroup | None,
    ) -> None:
        """`group`: the tensor-parallel ranks that hold the other cuts of the same matrices."""
        self.master, self.state, self.direction, self.decay, self.group = master, state, direction, decay, group
        shapes: dict[tuple[tuple[int, int], int | None], list[Part]] = {}
        for part in parts:
            shapes.setdefault((part.shape, part.axis), []).append(part)
        self.batches: list[tuple[int | None, list[Part]]] = []
        for ((rows, columns), axis), alike in shapes.items():
            count = max(1, BATCH // (rows * columns))
            self.batches += [(axis, alike[k : k + count]) for k in range(0, len(alike), count)]

    @torch.no_grad()
    def __call__(self, grad: Tensor, rate: float, update: int) -> None:
        """w = (1 - rate decay) w - rate direction(gradient, state). A collective over tensor-parallel ranks."""
        self.master.mul_(1 - rate * self.decay)
        for axis, parts in self.batches:
            split = Split(self.group, axis)
            state = {name: torch.stack([part.of(flat) for part in parts]) for name, flat in self.state.items()}
            step = self.direction(torch.stack([part.of(grad) for part in parts]), state, split, update)
            for k, part in enumerate(parts):
                part.of(self.master).add_(step[k], alpha=-rate)
                for name, flat in self.state.items():
                    part.of(flat).copy_(state[name][k])


def matched(o_KOI: Tensor, split: Split) -> Tensor:
    """An orthogonal direction scaled to the root mean square of an AdamW step: 0.2 sqrt(max(O, I)) (spec 2.10)."""
    return o_KOI * (0.2 * max(split.shape(o_KOI)) ** 0.5)


def muon(hyper: Matrix, g_KOI: Tensor, state: dict[str, Tensor], split: Split, update: int) -> Tensor:
    """m = b m + g; direction NS(m) (eqs. 42-44)."""
    state["momentum"].mul_(hyper.momentum).add_(g_KOI)
    return matched(newton_schulz(state["momentum"], hyper.iterations, split), split)


def m3(hyper: Matrix, g_KOI: Tensor, state: dict[str, Tensor], split: Split, update: int) -> Tensor:
    """Multi-scale momentum, stable form: both momenta are averages; the slow one moves every `slow_period` updates.

    Direction NS(fast) + a NS(slow); the slow direction is used from the update after it was computed (spec 2.10).
    """
    beta, slow = hyper.momentum, hyper.slow_momentum
    fast = state["momentum"].mul_(beta).add_(g_KOI, alpha=1 - beta)
    direction = newton_schulz(fast, hyper.iterations, split) + hyper.slow_gain * state["slow_direction"]
    state["sum"].add_(g_KOI)
    if update % hyper.slow_period == 0:
        mean = state["sum"] / hyper.slow_period
        state["slow_momentum"].mul_(slow).add_(mean, alpha=1 - slow)
        state["slow_direction"].copy_(newton_schulz(state["slow_momentum"], hyper.iterations, split))
        state["sum"].zero_()
    return matched(direction, split)


def m3_paper(hyper: Matrix, g_KOI: Tensor, state: dict[str, Tensor], split: Split, update: int) -> Tensor:
    """Algorithm 1 as printed, with sums of exactly `slow_period` terms: nothing decays; divided by sqrt(V)."""
    fast = state["momentum"].add_(g_KOI, alpha=hyper.momentum)
    state["second"].addcmul_(g_KOI, g_KOI)
    direction = newton_schulz(fast, hyper.iterations, split) + hyper.slow_gain * state["slow_direction"]
    state["sum"].add_(g_KOI)
    if update % hyper.slow_period == 0:
        state["slow_momentum"].add_(state["sum"], alpha=hyper.slow_momentum)
        state["slow_direction"].copy_(newton_schulz(state["slow_momentum"], hyper.iterations, split))
        state["sum"].zero_()
    return direction / (state["second"].sqrt() + hyper.eps)


def delta_momentum(hyper: Matrix, g_KOI: Tensor, state: dict[str, Tensor], split: Split, update: int) -> Tensor:
    """m = m (a I - e h^T h) + g with h = g / |g|: the momentum forgets along what the gradient says (eqs. 48, 49)."""
    h, m = g_KOI / (split.norm(g_KOI) + EPS), state["momentum"]
    erased = m @ split.right(h, h) if split.axis == 0 else split.left(m, h) @ h
    m.mul_(hyper.momentum).sub_(erased, alpha=hyper.delta).add_(g_KOI)
    return m


def dmgd(hyper: Matrix, g_KOI: Tensor, state: dict[str, Tensor], split: Split, update: int) -> Tensor:
    """Deep momentum (eq. 50), experimental: the momentum is a network m(u) = B^T tanh(A u) on rows u of g / rms(g).

    m = a m - e grad 1/2 |m(u) - u|^2, direction m(u). A and B are O // 2 hidden units each, kept as rows of one matrix.
    """

    def direct(g: Tensor, network: Tensor) -> list[Tensor]:
        u, hidden = g / (g.square().mean((-2, -1), keepdim=True).sqrt() + EPS), max(1, g.shape[-2] // 2)
        if update == 1:
            network = torch.cat([start(hidden, u), torch.zeros_like(network[:, hidden:])], 1)
        a, b = network[:, :hidden], network[:, hidden : 2 * hidden]
        active = torch.tanh(u @ a.mT)
        error = (active @ b - u) / u.shape[-2]
        step_b, step_a = active.mT @ error, ((error @ b.mT) * (1 - active.square())).mT @ u
        network, rate = network.clone(), hyper.inner / max(u.shape[-1], hidden)  # curvature grows with both
        network[:, :hidden] = hyper.momentum * a - rate * step_a
        network[:, hidden : 2 * hidden] = hyper.momentum * b - rate * step_b
        moved = torch.tanh(u @ network[:, :hidden].mT) @ network[:, hidden : 2 * hidden]
        return [moved, network]

    direction, network = split.whole(direct, g_KOI, state["network"])
    state["network"].copy_(network)
    return direction


def start(hidden: int, like_KOI: Tensor) -> Tensor:
    """The first layer of a momentum network: the same normal numbers on every rank and at every start."""
    width = like_KOI.shape[-1]
    values = torch.randn(hidden, width, generator=torch.Generator().manual_seed(hidden * 65537 + width)) / width**0.5
    return values.to(like_KOI).expand(len(like_KOI), -1, -1)


MATRICES: dict[str, Callable[..., Tensor]] = {
    "muon": muon,
    "m3": m3,
    "m3_paper": m3_paper,
    "delta_momentum": delta_momentum,
    "dmgd": dmgd,
}
