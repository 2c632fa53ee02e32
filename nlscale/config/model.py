"""The network: its shape, and the levels of its continuum."""

from dataclasses import dataclass, field
from typing import Literal

from nlscale.config.errors import require


@dataclass(frozen=True, kw_only=True)
class Level:
    """One learner of the continuum: a share of the feed-forward width that moves every `period`.

    Levels are listed fast to slow. Parameters outside the continuum (attention, embedding, norms, head) belong to the
    first level.
    """

    name: str = "all"
    period: int = 1
    unit: Literal["step"] = "step"
    width: float = 1.0  # share of model.hidden; the shares sum to 1, and 0 is a level without feed-forward units
    lr: float = 1.0  # factor on optim.lr

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), f"levels: name '{self.name}' must be a word of letters, digits and _")
        require(self.period >= 1, f"levels.{self.name}.period={self.period} must be at least 1")
        require(0 <= self.width <= 1, f"levels.{self.name}.width={self.width} is a share of the width, from 0 to 1")
        require(self.lr > 0, f"levels.{self.name}.lr={self.lr} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Model:
    """HOPE-Attention: attention, then a continuum of feed-forward levels, `layers` times (spec 2.8)."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None  # grouped-query attention; unset: as many as heads
    hidden: int | None = None  # feed-forward units of all levels together; unset: 4 x width (gelu), 8/3 (swiglu)
    activation: Literal["gelu", "swiglu"] = "swiglu"
    variant: Literal["independent", "sequential"] = "independent"
    attention: Literal["document", "causal"] = "document"  # document: no token attends across a document's start
    vocabulary: int | None = None  # unset: the dataset's, rounded up to a multiple of 128
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        require(
            self.width % (2 * self.heads) == 0,
            f"model.width={self.width} must be a multiple of 2 x model.heads={2 * self.heads} (rotary halves of a head); "
            f"{nearest(self.width, 2 * self.heads)} would work",
        )
        require(
            self.heads % self.key_value_heads == 0,
            f"model.heads={self.heads} must be a multiple of model.kv_heads={self.key_value_heads}; "
            f"kv_heads in {divisors(self.heads)} would work",
        )

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def feed_forward(self) -> int:
        """Feed-forward units of all levels together; the SwiGLU default is 8/3 x width, rounded up to 64."""
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.activation == "gelu" else -(-8 * self.width // 3 // 64) * 64


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The continuum as a checked whole: a divisibility chain of periods whose widths fill the feed-forward."""

    levels: list[Level] = field(default_factory=lambda: [Level()])

    def __post_init__(self) -> None:
        names = [level.name for level in self.levels]
        require(len(names) > 0, "levels: at least one level is needed; a plain Transformer has one with period 1")
        require(len(set(names)) == len(names), f"levels: names must differ, got {names}")
        require(
            self.levels[0].period == 1,
            f"levels: the first level '{names[0]}' has period {self.levels[0].period}, but attention and embeddings "
            "belong to it and move every step: put {name: trunk, period: 1, width: 0} before it",
        )
        for fast, slow in zip(self.levels, self.levels[1:], strict=False):
            require(
                slow.period % fast.period == 0,
                f"levels: periods form a divisibility chain, fast to slow: {slow.name}.period={slow.period} is no "
                f"multiple of {fast.name}.period={fast.period}; {nearest(slow.period, fast.period)} would work",
            )
        total = sum(level.width for level in self.levels)
        require(abs(total - 1) < 1e-6, f"levels: widths are shares and must sum to 1, got {total:g}")

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


def nearest(value: int, multiple: int) -> str:
    """The multiples on both sides of `value`, in words."""
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else f"{multiple}"


def divisors(value: int) -> list[int]:
    """All divisors of `value`, ascending."""
    return [d for d in range(1, value + 1) if value % d == 0]
