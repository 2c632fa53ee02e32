"""Nested learning's view of a run: its learners in the order of their update frequencies (Definitions 2 and 3; spec 2.1).

A comes before B if it is updated more often, or as often but B's state at a time needs A's state at that time. Learners
that are updated equally often and need nothing of each other share a level of the nesting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from nlscale.config.levels import Level, level_of
from nlscale.config.optim import STATES
from nlscale.config.run import Run


@dataclass(frozen=True)
class Learner:
    """Something with a state that is updated."""

    name: str
    frequency: float | Fraction  # updates a step; infinite: every token
    needs: frozenset[str] = frozenset()  # learners whose state of the same moment an update reads


def learners(run: Run) -> list[Learner]:
    """Attention, and each level's windows, rule and weights."""
    found = [Learner("attention", math.inf)]
    for level in run.levels:
        beat = Fraction(0) if level.frozen else Fraction(1, level.period)
        states = [f"{level.name}.{state}" for state in STATES[level.optimizer or run.optim.name]]
        window = f"{level.name}.window"
        found.append(Learner(window, Fraction(1)))
        found += [Learner(state, beat, frozenset({window})) for state in states]
        found.append(Learner(f"{level.name}.weight", beat, frozenset(states)))
    return found


def nesting(given: Sequence[Learner]) -> list[set[str]]:
    """The levels of the nesting, the fastest first."""
    depth: dict[str, int] = {}
    by_name = {learner.name: learner for learner in given}

    def deep(learner: Learner) -> int:
        equals = [by_name[n] for n in learner.needs if by_name[n].frequency == learner.frequency]
        if learner.name not in depth:
            depth[learner.name] = 1 + max((deep(other) for other in equals), default=-1)
        return depth[learner.name]

    places = {learner.name: (-learner.frequency, deep(learner)) for learner in given}
    return [{name for name, place in places.items() if place == each} for each in sorted(set(places.values()))]


def belongs(key: str, levels: Sequence[Level]) -> tuple[str, int, str]:
    """(level, period, unit) of a stored tensor: weights, moments, windows and states by their keys in a checkpoint."""
    level = level_of(key.rsplit("/", 1)[-1], levels)
    return level.name, level.period, level.unit
