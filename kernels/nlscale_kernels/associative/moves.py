"""Inner optimizers: how one pair changes a memory (spec 1, rows 2 to 8, 35)."""

import torch

from nlscale_kernels.arguments import check
from nlscale_kernels.associative.reference import Gates, Optimizer, Pair, State, Surprise, Weights


def no_memory(weights: Weights) -> Weights:
    """An optimizer that remembers nothing."""
    return {}


def zeros(weights: Weights) -> Weights:
    """An optimizer with one tensor a weight, zero at the start."""
    return {name: torch.zeros_like(weight) for name, weight in weights.items()}


def descend(state: State, surprise: Surprise, pair: Pair, gates: Gates) -> State:
    """w <- keep w - rate g."""
    gradient = surprise()
    moved = {name: gates.keep * w - gates.rate * gradient[name] for name, w in state.weights.items()}
    return State(moved, state.extra)


def accelerate(state: State, surprise: Surprise, pair: Pair, gates: Gates) -> State:
    """s <- momentum s - rate g, w <- keep w + s: two memories, the inner one of gradients (eqs. 10-13, A1)."""
    gradient = surprise()
    speed = {name: gates.momentum * s - gates.rate * gradient[name] for name, s in state.extra.items()}
    return State({name: gates.keep * w + speed[name] for name, w in state.weights.items()}, speed)


def erase(state: State, surprise: Surprise, pair: Pair, gates: Gates) -> State:
    """Delta Gradient Descent: w <- w (keep I - rate k k^T) - rate g where k enters, keep w - rate g elsewhere."""
    plain, up = descend(state, surprise, pair, gates).weights, state.weights["up"]
    return State(plain | {"up": plain["up"] - gates.rate * torch.outer(up @ pair.key, pair.key)}, state.extra)


def averages(weights: Weights) -> Weights:
    """An optimizer with running means of each element: of keys, of their squares and of the values' squares."""
    return {name: torch.zeros_like(weights["scale"]) for name in ("key", "key_square", "value_square")}


def settle(state: State, surprise: Surprise, pair: Pair, gates: Gates) -> State:
    """The exact minimiser of sum_i w_i |m * k_i - P|^2, w_i = rate keep^(t - i), P = sqrt(sum_i w_i v_i^2).

    With keep = beta, rate = 1 - beta and gradients for keys and values it is Adam's m / sqrt(v) (eqs. 100-105, A9).
    """
    news = {"key": pair.key, "key_square": pair.key.square(), "value_square": pair.value.square()}
    mean = {name: gates.keep * old + gates.rate * news[name] for name, old in state.extra.items()}
    return State({"scale": mean["key"] * mean["value_square"].sqrt() / mean["key_square"]}, mean)


def hold(last: int | None = None) -> Optimizer:
    """The optimizer of a memory without parameters: its `last` pairs are kept as they are (None: all; eqs. 62, 63).

    Raises ValueError where `last` is below 1.
    """
    check(last is None or last >= 1, f"hold: last is {last}; it must be at least 1, or None for all pairs")

    def keep(state: State, surprise: Surprise, pair: Pair, gates: Gates) -> State:
        news = {"keys": pair.key[None], "values": pair.value[None]}
        return State({name: torch.cat([old, news[name]])[-(last or 0) :] for name, old in state.weights.items()}, {})

    return Optimizer(no_memory, keep)


SGD = Optimizer(no_memory, descend)
MOMENTUM = Optimizer(zeros, accelerate)
DELTA = Optimizer(no_memory, erase)
ADAM = Optimizer(averages, settle)
