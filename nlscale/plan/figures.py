"""What a simulated rank holds and sends, as values that need no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

Traffic = Mapping[tuple[str, str], float]  # (axis, kind of collective) -> bytes that a rank sends


@dataclass(frozen=True)
class Moves:
    """A level's traffic, or that of those of its layers that move together. Bytes that a rank sends."""

    level: str
    period: int  # steps
    phase: int
    frozen: bool
    every_step: float
    a_move: float  # beside those of every step
    parameters: int  # of this rank
    add: Traffic  # the same, as counted: of every step ...
    close: Traffic  # ... and of a move


@dataclass(frozen=True)
class Memory:
    """What a rank holds between steps. Bytes."""

    weights: int  # that the model computes with, and the flat memory that is gathered
    windows: int  # gradients
    masters: int
    moments: int  # and whatever else the rules remember
    host: int  # masters and moments in host memory
    states: int  # of memories that never begin anew (model.reset=never)
    other: int  # engines, tables

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.windows + self.masters + self.moments + self.states + self.other


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage. Bytes."""

    index: int
    memory: Memory
    flying: int  # micro-batches whose activations it holds at once, at most
    kept: int  # by each of them
    activations: int  # at the peak of the schedule, above what is held between steps
    moving: int  # at the peak of a step in which every level moves (staggered: those of phase 0), above the same
    schedule: Traffic  # of one step's forward and backward
    moves: list[Moves]
    closing: Traffic  # of that step's end

    @property
    def resident(self) -> int:
        """The peak of a step in which every level moves."""
        return self.memory.total + max(self.activations, self.moving)
