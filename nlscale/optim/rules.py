"""Update rules on one rank's part of a flat: a float32 master, its gradient, and state that lies like the master.

Every state tensor is as long as the master and laid out like it, so that a checkpoint cuts all of them alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nlscale.config.levels import Level
from nlscale.config.optim import MATRIX_RULES, STATES, Optim
from nlscale.optim.dgd import delta_step
from nlscale.optim.layout import Kind
from nlscale.optim.matrices import MATRICES, Matrices, Part
from nlscale.optim.schedule import level_betas, level_decay


@dataclass
class Rule:
    """A rule bound to its master. `state`: name -> tensor like the master; `updates`: moves since it began anew."""

    master: Tensor
    state: dict[str, Tensor]
    apply: Callable[[Tensor, float, int], None]  # (gradient, rate, number of this update from 1)
    updates: int = 0

    def step(self, grad: Tensor, rate: float) -> None:
        """Moves the master along the mean gradient `grad`."""
        self.updates += 1
        self.apply(grad, rate, self.updates)


def adamw(master: Tensor, optim: Optim, level: Level, decay: float) -> Rule:
    """AdamW (Loshchilov and Hutter, 2019) by torch's fused operator."""
    optimizer = torch.optim.AdamW(
        [master], lr=optim.lr, betas=level_betas(optim, level), eps=optim.eps, weight_decay=decay, fused=True
    )
    state = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
    count = torch.zeros((), dtype=torch.float32, device=master.device)
    optimizer.state[master] = {"step": count, **state}

    def step(grad: Tensor, rate: float, update: int) -> None:
        count.fill_(update - 1)
        run(optimizer, master, grad, rate)

    return Rule(master, state, step)


def sgd(master: Tensor, optim: Optim, level: Level, decay: float) -> Rule:
    """m = a m + g, w -= lr (m + decay w): momentum as a two-level system (spec 1, row 4; eqs. 33, 34)."""
    momentum = torch.zeros_like(master)

    def step(grad: Tensor, rate: float, update: int) -> None:
        momentum.mul_(optim.matrix.momentum).add_(grad)
        master.mul_(1 - rate * decay).add_(momentum, alpha=-rate)

    return Rule(master, {"momentum": momentum}, step)


def preconditioned(master: Tensor, optim: Optim, level: Level, decay: float) -> Rule:
    """m = a m + P g with the diagonal P = 1 / (sqrt(E[g^2]) + eps) (spec 2.10; eqs. 46, 47, with a kept)."""
    momentum, second = torch.zeros_like(master), torch.zeros_like(master)
    beta = optim.matrix.second

    def step(grad: Tensor, rate: float, update: int) -> None:
        second.mul_(beta).addcmul_(grad, grad, value=1 - beta)
        scale = (second / (1 - beta**update)).sqrt_().add_(optim.matrix.eps)
        momentum.mul_(optim.matrix.momentum).addcdiv_(grad, scale)
        master.mul_(1 - rate * decay).add_(momentum, alpha=-rate * (1 - optim.matrix.momentum))

    return Rule(master, {"momentum": momentum, "second": second}, step)


def run(optimizer: torch.optim.Optimizer, master: Tensor, grad: Tensor, rate: float) -> None:
    """One step of a torch optimizer that holds one tensor."""
    optimizer.param_groups[0]["lr"] = rate
    master.grad = grad
    optimizer.step()
    master.grad = None


ELEMENTS: dict[str, Callable[[Tensor, Optim, Level, float], Rule]] = {
    "adamw": adamw,
    "sgd": sgd,
    "preconditioned": preconditioned,
}


def bind(
    kind: Kind,
    master: Tensor,
    optim: Optim,
    level: Level,
    parts: Sequence[Part],
    tensor: ProcessGroup | None,
    inputs: Mapping[str, Tensor],
) -> Rule:
    """The rule of a flat on this rank's part of it.

    `parts`: the whole matrices there, cut over the ranks of `tensor`; `inputs`: what windows say of a leaf's inputs.
    """
    decay = level_decay(optim, level) if kind.decays else 0.0
    if kind.rule not in MATRIX_RULES:
        return ELEMENTS[kind.rule](master, optim, level, decay)
    if kind.rule == "dgd":
        return Rule(master, {}, delta_step(master, decay, parts, tensor, inputs))
    state = {name: torch.zeros_like(master) for name in STATES[kind.rule]}
    direction = partial(MATRICES[kind.rule], optim.matrix)
    return Rule(master, state, Matrices(master, state, direction, decay, parts, tensor))
