"""Associative memory as one small interface (Behrouz et al., 2025, Definition 1, eq. 6; spec 1, row 1).

A memory is an operator from keys to values; learning it is minimising an objective over the pairs of its context. Five
things make one: a network (what the operator may be), an objective, an inner optimizer (how a pair changes it), a context
and a state. A weight matrix under SGD, every layer of a network under backpropagation, a momentum, Adam, linear attention,
the delta rule, softmax attention and Titans are all instances; the fast forms elsewhere in this package are held against
these.

One memory, one pair at a time: key (K,), value (V,). `torch.vmap` makes rows and heads of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale_kernels.associative.closed import nearest

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


class Pair(NamedTuple):
    """One association."""

    key: Tensor
    value: Tensor


class Context(NamedTuple):
    """The pairs that a memory is to hold, in the order in which they come."""

    keys: Tensor  # (T, K)
    values: Tensor  # (T, V)


class Gates(NamedTuple):
    """How one pair is written: scalars of that token."""

    rate: Tensor | float = 1.0
    keep: Tensor | float = 1.0  # share of the state that stays
    momentum: Tensor | float = 0.0


Surprise = Callable[[], Weights]


class Optimizer(NamedTuple):
    """An inner optimizer: what it remembers at the start, and one move.

    A move is told the state, the objective's gradient for the pair (computed when it is asked for), the pair and its gates.
    """

    begin: Callable[[Weights], Weights]
    move: Callable[[State, Surprise, Pair, Gates], State]


@dataclass(frozen=True)
class Associative:
    """Network, objective and optimizer; a context and a state go in, a state comes out."""

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

        def surprise() -> Weights:
            return torch.func.grad(loss)((at or state).weights)

        return self.optimizer.move(state, surprise, Pair(key, value), gates)

    def learn(self, state: State, context: Context, gates: Sequence[Gates]) -> State:
        """The state after a context; one entry of `gates` a pair."""
        for key, value, gate in zip(*context, gates, strict=True):
            state = self.write(state, key, value, gate)
        return state

    def read(self, state: State, query: Tensor) -> Tensor:
        """What the memory says."""
        return self.network(state.weights, query)


def linear(weights: Weights, key: Tensor) -> Tensor:
    """W k."""
    return weights["up"] @ key


def mlp(weights: Weights, key: Tensor) -> Tensor:
    """k + W1 silu(W2 k): W2 = up (M, K), W1 = down (K, M)."""
    return key + weights["down"] @ F.silu(weights["up"] @ key)


def scaled(weights: Weights, key: Tensor) -> Tensor:
    """m * k, element by element."""
    return weights["scale"] * key


def regression(scale: float) -> Network:
    """argmin_m sum_i exp(scale <k_i, q>) |v_i - m|^2 over the pairs held: softmax attention, whose weights are its context
    (Nadaraya and Watson's estimate; eqs. 62, 63).
    """

    def answer(weights: Weights, query: Tensor) -> Tensor:
        return nearest(query, weights["keys"], weights["values"], scale)

    return answer


def dot(said: Tensor, value: Tensor) -> Tensor:
    """-<M k, v>: Hebbian."""
    return -(said * value).sum()


def square(said: Tensor, value: Tensor) -> Tensor:
    """|M k - v|^2 / 2."""
    return 0.5 * (said - value).square().sum()
