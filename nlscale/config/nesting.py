"""Nested learning's view of a run: its learners in the order of their update frequencies (Definitions 2 and 3; spec 2.1).

A comes before B if it is updated more often, or as often but B's state at a time needs A's state at that time. Learners
that are updated equally often and need nothing of each other share a level of the nesting.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from nlscale.config.levels import level_of, token_levels
from nlscale.config.mixers import chunk_of
from nlscale.config.optim import STATES
from nlscale.config.run import Run


@dataclass(frozen=True)
class Learner:
    """Something with a state that is updated."""

    name: str
    frequency: float | Fraction  # updates a step; infinite: every token
    needs: frozenset[str] = frozenset()  # learners whose state of the same moment an update reads


def learners(run: Run) -> list[Learner]:
    """The blocks' mixer of tokens, and each level's windows, rule and weights."""
    found = list(mixers(run))
    # a token's activation, which passes the blocks again with what attention and memories then say
    if run.model.loops > 1:
        at_once = frozenset(learner.name for learner in found if learner.frequency == math.inf)
        found.append(Learner("loop", math.inf, at_once))
    for level in run.levels:
        beat = Fraction(0) if level.frozen else Fraction(1, level.steps)
        states = [f"{level.name}.{state}" for state in STATES[level.optimizer or run.optim.name]]
        window = f"{level.name}.window"
        found.append(Learner(window, Fraction(1)))
        found += [Learner(state, beat, frozenset({window})) for state in states]
        found.append(Learner(f"{level.name}.weight", beat, frozenset(states)))
    return found


def mixers(run: Run) -> Iterator[Learner]:
    """Attention sees every token at once; a memory moves once a chunk of each row."""
    model, tokens = run.model, run.train.global_batch * run.data.sequence
    chunk = Fraction(tokens, chunk_of(model)[1])
    if model.mixer in ("attention", "written", "titans_mag", "titans_mal", "titans_mac"):
        yield Learner("attention", math.inf)
    if model.mixer in ("linear", "delta", "written"):
        yield Learner("memory", math.inf)
    elif model.mixer == "self_modifying":
        yield Learner("memory.makers", chunk)
        yield Learner("memory.main", Fraction(tokens, model.self_modifying.chunk), frozenset({"memory.makers"}))
    elif model.mixer != "attention":
        yield Learner("memory", chunk)
    for level in token_levels(run.levels):
        yield Learner(f"{level.name}.copy", Fraction(tokens, level.period))


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


def belongs(key: str, run: Run) -> tuple[str, int, str]:
    """(learner, period, unit) of a stored tensor: weights, moments, windows and memories by their keys in a checkpoint.

    A period of 0: it never moves. Moments are of their weights' level; what moves otherwise is said by itself.
    """
    kind, name = key.split("/", 1)[0], key.rsplit("/", 1)[-1]
    if kind != "memories":
        return of_level(kind, name.removesuffix(".gram").removesuffix(".gram_cut"), run)
    _, _, part, *rest = name.split(".")
    if part == "continuum":
        copies = {level.name: level.period for level in token_levels(run.levels)}
        return f"{rest[0]}.copy", copies[rest[0]], "token"
    if "tail" in rest:
        return "convolution", 1, "token"
    if run.model.mixer == "self_modifying":
        settings, main = run.model.self_modifying, "main" in rest
        return ("memory.main", settings.chunk, "token") if main else ("memory.makers", settings.makers, "token")
    return "memory", 1 if run.model.mixer in ("linear", "delta", "written") else chunk_of(run.model)[1], "token"


def of_level(kind: str, name: str, run: Run) -> tuple[str, int, str]:
    """Of what a level keeps of a parameter: its window moves at every step, a nested level's slow copy with the next level,
    M3's slow momentum at some of the level's moves.
    """
    level = level_of(name, run.levels)
    period = 0 if level.frozen else level.steps
    if kind == "windows":
        return f"{level.name}.window", 1, "step"
    if kind == "state.slow":
        slower = run.levels[run.levels.index(level) + 1]
        return f"{level.name}.slow", slower.steps, "step"
    if kind in ("state.slow_momentum", "state.slow_direction"):
        return f"{level.name}.{kind.removeprefix('state.')}", period * run.optim.matrix.slow_period, "step"
    return level.name, period, "step"


def registry(sizes: Mapping[str, int], run: Run) -> dict[str, dict[str, Any]]:
    """Of each learner that stored tensors belong to: period, unit, bytes and the tensors' keys; `sizes`: bytes by key.

    The parts of a leaf's window, of which there may be one a rank, are named once.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in sorted(sizes):
        learner, period, unit = belongs(key, run)
        own = found.setdefault(learner, {"period": period, "unit": unit, "bytes": 0, "tensors": {}})
        own["bytes"] += sizes[key]
        own["tensors"][f"windows/{key.rsplit('/', 1)[-1]}" if key.startswith("windows/") else key] = None
    return {name: own | {"tensors": list(own["tensors"])} for name, own in found.items()}
