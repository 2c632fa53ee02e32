"""The levels of a continuum, and which parameter belongs to which (spec 2.1)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from nlscale.config.errors import nearest, require
from nlscale.config.model import Model
from nlscale.config.optim import RULES
from nlscale.config.shapes import mixer_shapes

TAKEN = ("attention", "convolution", "loop", "memory")  # learners of config/nesting.py


@dataclass(frozen=True, kw_only=True)
class Level:
    """One learner of the continuum: a share of the feed-forward width that moves every `period`.

    A level with `unit: token` moves inside each row, in the last layers; where a row begins, it begins at weights that are
    learned like those of a level that moves every step. Such levels come first.

    Levels are listed fast to slow. Parameters outside the continuum (attention, embedding, norms, head) belong to the
    first level, unless another one's `match` names them.
    """

    name: str = "all"
    period: int = 1
    unit: Literal["step", "token"] = "step"
    width: float = 1.0  # share of model.hidden; the shares sum to 1, and 0 is a level without feed-forward units
    lr: float = 1.0  # factor on optim.lr
    inner: float = 1.0  # unit token: factor on model.inner.lr
    optimizer: str | None = None  # its rule; unset: optim.name
    match: list[str] = field(default_factory=list)  # further parameters of this level: patterns over their names
    frozen: bool = False  # never moves
    of: str | None = None  # at a resume with checkpoint.levels=change: begins as a part of this level's trained units
    anchor: float = 0.0  # pull towards the weights at the end of the task before (EWC), times its rate; 0: none
    project: int = 0  # places for gradient directions of earlier tasks that its moves stay orthogonal to (OGD)
    replay: float = 0.0  # what a replayed target (data.replay) counts against a new one, in this level alone

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), f"levels: name '{self.name}' must be a word of letters, digits and _")
        require(
            self.name not in TAKEN, f"levels: a level cannot be called {self.name}, which is a learner between tokens"
        )
        require(self.period >= 1, f"levels.{self.name}.period={self.period} must be at least 1")
        require(self.inner >= 0, f"levels.{self.name}.inner={self.inner} must not be negative")
        require(
            self.unit == "token" or self.inner == 1.0,
            f"levels.{self.name}.inner={self.inner} is a factor on model.inner.lr, which a level with unit: step has not; "
            "unit: token would work, or lr for the optimizer's",
        )
        require(
            self.unit == "step" or self.width > 0,
            f"levels.{self.name}.unit=token moves feed-forward units inside a sequence; width 0 has none",
        )
        require(0 <= self.width <= 1, f"levels.{self.name}.width={self.width} is a share of the width, from 0 to 1")
        for name in ("anchor", "project", "replay"):
            value = getattr(self, name)
            require(value >= 0, f"levels.{self.name}.{name}={value} must not be negative")
        require(self.lr > 0, f"levels.{self.name}.lr={self.lr} must be above 0")
        require(
            self.optimizer is None or self.optimizer in RULES,
            f"levels.{self.name}.optimizer={self.optimizer} is no rule; choose one of {', '.join(RULES)}",
        )

    @property
    def steps(self) -> int:
        """Steps between two moves of the weights that outlive a row."""
        return self.period if self.unit == "step" else 1


def due(level: Level, count: int, phase: int = 0, unit: Literal["step", "token"] = "step") -> bool:
    """Whether `level` moves at the end of step `count`, from 1; of unit `token`: a row's copy of it after so many tokens.

    A pure function of the count: no rank keeps a clock.
    """
    period = level.steps if unit == "step" else level.period
    return not level.frozen and (count + phase) % period == 0


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The continuum as a checked whole: a divisibility chain of periods whose widths fill the feed-forward."""

    levels: list[Level] = field(default_factory=lambda: [Level()])

    def __post_init__(self) -> None:
        names = [level.name for level in self.levels]
        require(len(names) > 0, "levels: at least one level is needed; a plain Transformer has one with period 1")
        require(len(set(names)) == len(names), f"levels: names must differ, got {names}")
        for fast, slow in zip(self.levels, self.levels[1:], strict=False):
            require(
                fast.unit == "token" or slow.unit == "step",
                f"levels: {slow.name} (unit token) moves inside a row, so it comes before {fast.name} (unit step)",
            )
            if fast.unit != slow.unit:
                continue
            require(
                slow.period % fast.period == 0,
                f"levels: periods form a divisibility chain, fast to slow: {slow.name}.period={slow.period} is no "
                f"multiple of {fast.name}.period={fast.period}; {nearest(slow.period, fast.period)} would work",
            )
        require(not all(level.frozen for level in self.levels), "levels: all are frozen; nothing would be trained")
        total = sum(level.width for level in self.levels)
        require(abs(total - 1) < 1e-6, f"levels: widths are shares and must sum to 1, got {total:g}")

    def check_match(self, names: Iterable[str]) -> None:
        """Raises UserError, with the table of what matched, where a level matches nothing or a name matches twice."""
        members: dict[str, list[str]] = {level.name: [] for level in self.levels}
        for name in names:
            claims = claimants(name, self.levels)
            require(
                len(claims) <= 1,
                f"levels: '{name}' is matched by {' and '.join(level.name for level in claims)}; a parameter has one level",
            )
            members[(claims[0] if claims else unclaimed(name, self.levels)).name].append(name)
        table = "; ".join(f"{k}: {len(v)} ({v[0]} ...)" if v else f"{k}: none" for k, v in members.items())
        for level in self.levels:
            for pattern in level.match:
                require(
                    any(fnmatchcase(name, pattern) for name in names),
                    f"levels.{level.name}.match: '{pattern}' matches no parameter. Matched: {table}",
                )
            require(len(members[level.name]) > 0, f"levels: {level.name} matches no parameter. Matched: {table}")

    def units(self, feed_forward: int) -> dict[str, int]:
        """Feed-forward units of each level, in order; raises UserError where a share is no whole number."""
        units = {level.name: level.width * feed_forward for level in self.levels}
        for name, value in units.items():
            require(
                abs(value - round(value)) < 1e-6,
                f"levels.{name}.width gives {value:g} of model.hidden={feed_forward} units; "
                "choose shares or model.hidden so that every level has a whole number",
            )
        return {name: round(value) for name, value in units.items()}


def claimants(name: str, levels: Sequence[Level]) -> list[Level]:
    """Levels whose `match` names a parameter; where none does, the one whose slice of a continuum it is."""
    named = [level for level in levels if any(fnmatchcase(name, pattern) for pattern in level.match)]
    if named:
        return named
    # blocks, which one, continuum, level, part; patterns would take long for thousands of names
    place = name.split(".", 4)
    own = place[3] if len(place) == 5 and place[0] == "blocks" and place[2] == "continuum" else None
    return [level for level in levels if level.name == own]


def level_of(name: str, levels: Sequence[Level]) -> Level:
    """The level of a parameter: by `match`, by its continuum's slice, the first that moves in steps for everything else.

    The gains that weigh levels against each other move with the slowest (spec 2.4).
    """
    claims = claimants(name, levels)
    return claims[0] if claims else unclaimed(name, levels)


def unclaimed(name: str, levels: Sequence[Level]) -> Level:
    """The level of a parameter that nobody claims."""
    if name.endswith(".continuum.gains"):
        return levels[-1]
    return next((level for level in levels if level.unit == "step"), levels[0])


def token_levels(levels: Sequence[Level]) -> list[Level]:
    """Those that move inside a row, fast to slow."""
    return [level for level in levels if level.unit == "token"]


def learning(levels: Sequence[Level]) -> list[Level]:
    """Those of them that are not frozen."""
    return [level for level in token_levels(levels) if not level.frozen]


def parameter_names(model: Model, levels: Sequence[Level]) -> Iterator[str]:
    """The names of all parameters of a model, as the model itself gives them (a test compares the two)."""
    inward = ("gate", "up") if model.activation == "swiglu" else ("up",)
    held, mixer = [level.name for level in levels if level.width], list(mixer_shapes(model))
    yield "embed.weight"
    for block in (f"blocks.{j}" for j in range(model.layers)):
        yield from (f"{block}.mix.{name}" for name in mixer)
        norms = ["norm"] if model.variant == "independent" else [f"{name}.norm" for name in held]
        yield from (f"{block}.continuum.{norm}.weight" for norm in norms)
        if model.gains:
            yield f"{block}.continuum.gains"
        yield from (f"{block}.continuum.{name}.{part}.weight" for name in held for part in (*inward, "down"))
    yield "norm.weight"
    if not model.tied:
        yield "head.weight"
