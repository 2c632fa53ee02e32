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
from nlscale_kernels import level_step
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


Gather = Callable[[Tensor, dict[str, Tensor], float, int], None]  # (gradients, state, scale, update) on the whole part
# Of matrices of one shape: the momentum that was gathered, or where nothing is the scaled gradients; states, split, update.
Direction = Callable[[Tensor, dict[str, Tensor], Split, int], Tensor]


class Matrices:
    """Applies a rule to all matrices of a part, shape by shape."""

    def __init__(
        self,
        master: Tensor,
        state: dict[str, Tensor],
        gather: Gather | None,
        direction: Direction,
        decay: float,
        parts: Sequence[Part],
        group: dist.ProcessGroup | None,
        copy: Tensor | None,
    ) -> None:
        """`group`: the tensor-parallel ranks that hold the other cuts of the same matrices; `copy`: see rules.bind."""
        self.master, self.state, self.decay, self.group, self.copy = master, state, decay, group, copy
        self.gather, self.direction = gather, direction
        shapes: dict[tuple[tuple[int, int], int | None], list[Part]] = {}
        for part in parts:
            shapes.setdefault((part.shape, part.axis), []).append(part)
        self.batches: list[tuple[int | None, list[Part]]] = []
        for ((rows, columns), axis), alike in shapes.items():
            count = max(1, BATCH // (rows * columns))
            self.batches += [(axis, alike[k : k + count]) for k in range(0, len(alike), count)]

    @torch.no_grad()
    def __call__(self, grad: Tensor, rate: float, scale: float, update: int) -> Tensor:
        """w = (1 - rate decay) w - rate direction(scale x gradient, state): the squared change of each block.

        A collective over tensor-parallel ranks.
        """
        if self.gather is not None:
            self.gather(grad, self.state, scale, update)
        step = torch.zeros_like(self.master)
        for axis, parts in self.batches:
            state = {name: torch.stack([part.of(flat) for part in parts]) for name, flat in self.state.items()}
            gradients = None
            if self.gather is None:
                gradients = torch.stack([part.of(grad) for part in parts]).to(self.master.dtype) * scale
            found = self.direction(
                state["momentum"] if gradients is None else gradients, state, Split(self.group, axis), update
            )
            changed = [name for name, stacked in state.items() if stacked._version]  # in place
            for k, part in enumerate(parts):
                part.of(step).copy_(found[k])
                for name in changed:
                    part.of(self.state[name]).copy_(state[name][k])
        rows = [level_step.Descend(1.0, rate, self.decay)]
        return level_step.descend(self.master, step, self.copy, level_step.table(rows, self.master))


def gather_muon(hyper: Matrix, grad: Tensor, state: dict[str, Tensor], scale: float, update: int) -> None:
    """m = b m + g (eqs. 42-44)."""
    rows = [level_step.Momenta(1.0, scale, hyper.momentum, 1.0)]
    level_step.momenta(grad, state["momentum"], None, None, level_step.table(rows, state["momentum"]))


def gather_m3(hyper: Matrix, grad: Tensor, state: dict[str, Tensor], scale: float, update: int) -> None:
    """Both momenta are averages; the slow one takes the mean of every `slow_period` gradients (spec 2.10)."""
    slow, fires = hyper.slow_momentum, float(update % hyper.slow_period == 0)
    kept = (fires, slow, (1 - slow) / hyper.slow_period)
    rows = [level_step.Momenta(1.0, scale, hyper.momentum, 1 - hyper.momentum, *kept)]
    table = level_step.table(rows, state["momentum"])
    level_step.momenta(grad, state["momentum"], state["sum"], state["slow_momentum"], table)


def gather_m3_paper(hyper: Matrix, grad: Tensor, state: dict[str, Tensor], scale: float, update: int) -> None:
    """Algorithm 1 as printed, with sums of exactly `slow_period` terms: nothing decays."""
    fires = float(update % hyper.slow_period == 0)
    rows = [level_step.Momenta(1.0, scale, 1.0, hyper.momentum, fires, 1.0, hyper.slow_momentum)]
    table = level_step.table(rows, state["momentum"])
    level_step.momenta(grad, state["momentum"], state["sum"], state["slow_momentum"], table)
    state["second"].addcmul_(grad, grad, value=scale * scale)


def matched(o_KOI: Tensor, split: Split) -> Tensor:
    """An orthogonal direction scaled to the root mean square of an AdamW step: 0.2 sqrt(max(O, I)) (spec 2.10)."""
    return o_KOI * (0.2 * max(split.shape(o_KOI)) ** 0.5)


def muon(hyper: Matrix, m_KOI: Tensor, state: dict[str, Tensor], split: Split, update: int) -> Tensor:
    """NS(m)."""
    return matched(newton_schulz(m_KOI, hyper.iterations, split), split)


def m3(hyper: Matrix, m_KOI: Tensor, state: dict[str, Tensor], split: Split, update: int) -> Tensor:
    """Multi-scale momentum, stable form: NS(fast) + a NS(slow) (spec 2.10)."""
    return matched(both_scales(hyper, m_KOI, state, split, update), split)


def m3_paper(hyper: Matrix, m_KOI: Tensor, state: dict[str, Tensor], split: Split, update: int) -> Tensor:
    """Algorithm 1 as printed: the same, divided by sqrt(V)."""
    return both_scales(hyper, m_KOI, state, split, update) / (state["second"].sqrt() + hyper.eps)


def both_scales(hyper: Matrix, m_KOI: Tensor, state: dict[str, Tensor], split: Split, update: int) -> Tensor:
    """NS(fast) + a NS(slow); the slow direction is used from the update after it was computed."""
    direction = newton_schulz(m_KOI, hyper.iterations, split) + hyper.slow_gain * state["slow_direction"]
    if update % hyper.slow_period == 0:
        state["slow_direction"].copy_(newton_schulz(state["slow_momentum"], hyper.iterations, split))
    return direction


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


MATRICES: dict[str, tuple[Callable[..., None] | None, Callable[..., Tensor]]] = {
    "muon": (gather_muon, muon),
    "m3": (gather_m3, m3),
    "m3_paper": (gather_m3_paper, m3_paper),
    "delta_momentum": (None, delta_momentum),
    "dmgd": (None, dmgd),
}
