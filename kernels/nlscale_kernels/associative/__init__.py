"""Associative memory: the one idea behind every learner here, in small forms to read and to test against."""

from nlscale_kernels.associative.closed import (
    adam_memory,
    delta_step,
    follow_leader,
    momentum_memory,
    nearest,
    proximal,
)
from nlscale_kernels.associative.generation import generated, programmed, written_in_context
from nlscale_kernels.associative.reference import (
    DELTA,
    MOMENTUM,
    SGD,
    Associative,
    Gates,
    State,
    dot,
    handed,
    linear,
    mlp,
    square,
)
from nlscale_kernels.associative.signals import Signal, signals

__all__ = [
    "DELTA",
    "MOMENTUM",
    "SGD",
    "Associative",
    "Gates",
    "Signal",
    "State",
    "adam_memory",
    "delta_step",
    "dot",
    "follow_leader",
    "generated",
    "handed",
    "linear",
    "mlp",
    "momentum_memory",
    "nearest",
    "programmed",
    "proximal",
    "signals",
    "square",
    "written_in_context",
]
