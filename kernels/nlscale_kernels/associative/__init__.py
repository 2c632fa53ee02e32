"""Associative memory: the one idea behind every learner here, in small forms to read and to test against."""

from nlscale_kernels.associative.closed import (
    adam_memory,
    deep_step,
    delta_step,
    follow_leader,
    momentum_memory,
    nearest,
    proximal,
)
from nlscale_kernels.associative.generation import generated, programmed, written_in_context
from nlscale_kernels.associative.moves import ADAM, DELTA, MOMENTUM, SGD, hold
from nlscale_kernels.associative.reference import (
    Associative,
    Context,
    Gates,
    State,
    dot,
    handed,
    linear,
    mlp,
    regression,
    scaled,
    square,
)
from nlscale_kernels.associative.signals import Signal, signals

__all__ = [
    "ADAM",
    "DELTA",
    "MOMENTUM",
    "SGD",
    "Associative",
    "Context",
    "Gates",
    "Signal",
    "State",
    "adam_memory",
    "deep_step",
    "delta_step",
    "dot",
    "follow_leader",
    "generated",
    "handed",
    "hold",
    "linear",
    "mlp",
    "momentum_memory",
    "nearest",
    "programmed",
    "proximal",
    "regression",
    "scaled",
    "signals",
    "square",
    "written_in_context",
]
