"""Associative memory as one small interface (Behrouz et al., 2025, Definition 1, eq. 6; spec 1, row 1).

A memory is an operator from keys to values; learning it is minimising an objective over the pairs that it has seen, its
context. Four things make one: a network (what the operator may be), an objective, an inner optimizer (how one pair changes
it) and a state. A weight matrix under SGD, a momentum, linear attention, the delta rule and Titans are all instances; the
fast forms elsewhere in this package are held against these.

One memory, one pair at a time: key (K,), value (V,). `torch.vmap` makes rows and heads of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Network = Callable[[Weights, Tensor], Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]


class State(NamedTuple):
    """What a memory is after a context: its weights, and what its optimizer remembers of each."""

    weights: Weights
    extra: Weights


def handed(state: State, taught: bool) -> State:
    """What a slower learner is handed of a faster one: no gradient reaches what wrote it, unless it is to be `taught`
    (parametric conditioning; spec 1, rows 11 and 14).
    """
    return state if taught else State(*({name: each.detach() for name, each in part.items()} for part in state))


class Gates(NamedTuple):
    """How one pair is written: scalars of that token."""

    rate: Tensor | float = 1.0
    keep: Tensor | float = 1.0  # share of the state that stays
    momentum: Tensor | float = 0.0


class Optimizer(NamedTuple):
    """An inner optimizer: what it remembers at the start, and one move."""

    begin: Callable[[Weights], Weights]
    move: Callable[[State, Weights, Tensor, Gates], State]


@dataclass(frozen=True)
class Associative:
    """Network, objective and optimizer; the state goes in and comes out."""

    network: Network
    objective: Objective
    optimizer: Optimizer

    def begin(self, weights: Weights) -> State:
        """The state before any pair."""
        return State(weights, self.optimizer.begin(weights))

    def write(self, state: State, key: Tensor, value: Tensor, gates: Gates, at: State | None = None) -> State:
        """The state after one pair; the gradient is taken at `at` (None: at `state`), as chunks take it at their begin."""

        def loss(weights: Weights) -> Tensor:
            return self.objective(self.network(weights, key), value)

        gradient = torch.func.grad(loss)((at or state).weights)
        return self.optimizer.move(state, gradient, key, gates)

    def read(self, state: State, query: Tensor) -> Tensor:
        """What the memory says."""
        return self.network(state.weights, query)


def linear(weights: Weights, key: Tensor) -> Tensor:
    """W k."""
    return weights["up"] @ key


def mlp(weights: Weights, key: Tensor) -> Tensor:
    """k + W1 silu(W2 k): W2 = up (M, K), W1 = down (K, M)."""
    return key + weights["down"] @ F.silu(weights["up"] @ key)


def dot(said: Tensor, value: Tensor) -> Tensor:
    """-<M k, v>: Hebbian."""
    return -(said * value).sum()


def square(said: Tensor, value: Tensor) -> Tensor:
    """|M k - v|^2 / 2."""
    return 0.5 * (said - value).square().sum()


def no_memory(weights: Weights) -> Weights:
    """An optimizer that remembers nothing."""
    return {}


def zeros(weights: Weights) -> Weights:
    """An optimizer with one tensor a weight, zero at the start."""
    return {name: torch.zeros_like(weight) for name, weight in weights.items()}


def descend(state: State, gradient: Weights, key: Tensor, gates: Gates) -> State:
    """w <- keep w - rate g."""
    moved = {name: gates.keep * w - gates.rate * gradient[name] for name, w in state.weights.items()}
    return State(moved, state.extra)


def accelerate(state: State, gradient: Weights, key: Tensor, gates: Gates) -> State:
    """s <- momentum s - rate g, w <- keep w + s: two memories, the inner one of gradients (eqs. 10-13, A1)."""
    speed = {name: gates.momentum * s - gates.rate * gradient[name] for name, s in state.extra.items()}
    return State({name: gates.keep * w + speed[name] for name, w in state.weights.items()}, speed)


def erase(state: State, gradient: Weights, key: Tensor, gates: Gates) -> State:
    """Delta Gradient Descent: w <- w (keep I - rate k k^T) - rate g where k enters, keep w - rate g elsewhere."""
    plain = descend(state, gradient, key, gates).weights
    up = state.weights["up"]
    return State(plain | {"up": plain["up"] - gates.rate * torch.outer(up @ key, key)}, state.extra)


SGD = Optimizer(no_memory, descend)
MOMENTUM = Optimizer(zeros, accelerate)
DELTA = Optimizer(no_memory, erase)
