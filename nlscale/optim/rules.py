"""Update rules on one rank's part of a flat: a float32 master, its gradient, and state that lies like the master.

Every state tensor is as long as the master and laid out like it, so that a checkpoint cuts all of them alike. AdamW and the
matrix rules move the whole part at once by the operators of nlscale_kernels.level_step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from nlscale_kernels import level_step
from torch import Tensor
from torch.distributed import ProcessGroup

from nlscale.config.levels import Level
from nlscale.config.optim import MATRIX_RULES, STATES, Optim
from nlscale.optim.dgd import delta_step
from nlscale.optim.layout import Kind
from nlscale.optim.matrices import MATRICES, Matrices, Part
from nlscale.optim.schedule import level_betas, level_decay

Apply = Callable[[Tensor, float, float, int], Tensor | None]  # (gradient, rate, scale, number of this update from 1)


@dataclass
class Rule:
    """A rule bound to its master. `state`: name -> tensor like the master; `updates`: moves since it began anew."""

    master: Tensor
    state: dict[str, Tensor]
    apply: Apply
    updates: int = 0
    factor: float = 1.0  # on the rates that it is given
    copy: Tensor | None = None  # the weights that the model computes with, where the rule itself writes them
    tells: bool = False  # it says how far it moved

    def step(self, grad: Tensor, rate: float, scale: float = 1.0) -> Tensor | None:
        """Moves the master along `scale` x `grad`; gives the squared change of each block, where it is known."""
        self.updates += 1
        return self.apply(grad, rate * self.factor, scale, self.updates)


def adamw(master: Tensor, optim: Optim, level: Level, decay: float, copy: Tensor | None) -> Rule:
    """AdamW (Loshchilov and Hutter, 2019)."""
    first, second = torch.zeros_like(master), torch.zeros_like(master)
    betas = level_betas(optim, level)

    def step(grad: Tensor, rate: float, scale: float, update: int) -> Tensor:
        row = level_step.AdamW.at(update, rate, betas, optim.eps, decay, scale)
        return level_step.adamw(master, grad, first, second, copy, level_step.table([row], master))

    return Rule(master, {"exp_avg": first, "exp_avg_sq": second}, step, copy=copy, tells=True)


def sgd(master: Tensor, optim: Optim, level: Level, decay: float, copy: Tensor | None) -> Rule:
    """m = a m + g, w -= lr (m + decay w): momentum as a two-level system (spec 1, row 4; eqs. 33, 34)."""
    momentum = torch.zeros_like(master)

    def step(grad: Tensor, rate: float, scale: float, update: int) -> None:
        momentum.mul_(optim.matrix.momentum).add_(grad, alpha=scale)
        master.mul_(1 - rate * decay).add_(momentum, alpha=-rate)

    return Rule(master, {"momentum": momentum}, step)


def preconditioned(master: Tensor, optim: Optim, level: Level, decay: float, copy: Tensor | None) -> Rule:
    """m = a m + P g with the diagonal P = 1 / (sqrt(E[g^2]) + eps) (spec 2.10; eqs. 46, 47, with a kept)."""
    momentum, second = torch.zeros_like(master), torch.zeros_like(master)
    beta = optim.matrix.second

    def step(grad: Tensor, rate: float, scale: float, update: int) -> None:
        second.mul_(beta).addcmul_(grad, grad, value=(1 - beta) * scale**2)
        root = (second / (1 - beta**update)).sqrt_().add_(optim.matrix.eps)
        momentum.mul_(optim.matrix.momentum).addcdiv_(grad, root, value=scale)
        master.mul_(1 - rate * decay).add_(momentum, alpha=-rate * (1 - optim.matrix.momentum))

    return Rule(master, {"momentum": momentum, "second": second}, step)


ELEMENTS: dict[str, Callable[[Tensor, Optim, Level, float, Tensor | None], Rule]] = {
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
    copy: Tensor | None = None,
) -> Rule:
    """The rule of a flat on this rank's part of it.

    `parts`: the whole matrices there, cut over the ranks of `tensor`; `inputs`: what windows say of a leaf's inputs;
    `copy`: the weights that the model computes with, where nobody else changes the master before they are sent.
    """
    decay = level_decay(optim, level) if kind.decays else 0.0
    if kind.rule not in MATRIX_RULES:
        rule = ELEMENTS[kind.rule](master, optim, level, decay / kind.rate, copy)  # rate x decay does not transfer
        rule.factor = kind.rate
        return rule
    if kind.rule == "dgd":
        return Rule(master, {}, delta_step(master, decay, parts, tensor, inputs))
    state = {name: torch.zeros_like(master) for name in STATES[kind.rule]}
    gather, direction = MATRICES[kind.rule]
    held = (gather and partial(gather, optim.matrix), partial(direction, optim.matrix))
    matrices = Matrices(master, state, *held, decay, parts, tensor, copy)
    return Rule(master, state, matrices, copy=copy, tells=True)
