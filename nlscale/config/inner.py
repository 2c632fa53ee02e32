"""How levels move inside a sequence (spec 2.3): the inner optimizer of levels whose unit is `token`."""

from dataclasses import dataclass
from typing import Literal

from nlscale.config.errors import require


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Each row begins at the learned weights; its own copy of a level moves at the level's period of tokens."""

    layers: int | None = None  # the last layers adapt; unset: a quarter of them, one at least
    lr: float = 0.1  # of SGD on the mean loss of a window's tokens, times the level's `inner`
    warmup: float = 0.1  # share of the run's steps over which the rate rises from a tenth of itself
    clip: float = 1.0  # norm of a level's window; 0 switches it off
    meta: Literal["full", "first_order"] = "first_order"  # full: the gradient follows the inner moves
    form: Literal["auto", "whole", "factors"] = "auto"  # factors: what was written is kept as pairs, not as matrices
    shared: bool = False  # all sequences share one memory (Mode S): it moves by their mean gradient

    def __post_init__(self) -> None:
        require(self.layers is None or self.layers >= 1, f"model.inner.layers={self.layers} must be at least 1")
        for name in ("lr", "clip"):
            require(getattr(self, name) >= 0, f"model.inner.{name}={getattr(self, name)} must not be negative")
        require(0 <= self.warmup <= 1, f"model.inner.warmup={self.warmup} is a share of the steps, from 0 to 1")
        require(
            not self.shared or self.form != "factors",
            "model.inner.shared=true needs model.inner.form=whole: the pairs of all rows would outgrow the matrices",
        )

    def pace(self, step: int, steps: int) -> float:
        """Factor on the rate in step `step` (from 1) of a run of `steps`."""
        rising = self.warmup * steps
        return 1.0 if step >= rising else 0.1 + 0.9 * step / rising

    def adaptive(self, layers: int) -> int:
        """How many of the last layers adapt."""
        return self.layers or max(1, layers // 4)

    def by_factors(self, width: int, units: int, written: int) -> bool:
        """Whether pairs are the smaller form of a memory that `written` tokens wrote: fewer than d h / (d + h) (V22)."""
        return self.form == "factors" or (
            self.form == "auto" and not self.shared and written * (width + units) < width * units
        )
