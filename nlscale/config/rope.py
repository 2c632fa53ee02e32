"""Rotary positions that reach beyond the rows of an earlier training."""

from dataclasses import dataclass
from typing import Literal

from nlscale.config.errors import positive, require


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """What becomes of the frequencies of rotary positions. `linear`: all are divided by `factor` (position interpolation,
    Chen et al., 2023). `llama3`: those of waves longer than original / low_freq_factor tokens are, those of waves shorter
    than original / high_freq_factor are not, and between them they go over (Llama 3.1, 2024).
    """

    type: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original: int = 8192  # tokens of the rows of the earlier training

    def __post_init__(self) -> None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original")
        positive("model.rope_scaling", **{name: getattr(self, name) for name in names})
        require(
            self.type != "llama3" or self.low_freq_factor < self.high_freq_factor,
            f"model.rope_scaling.low_freq_factor={self.low_freq_factor} must be smaller than "
            f"high_freq_factor={self.high_freq_factor}",
        )
        require(
            self.type != "none" or self.factor == 1,
            f"model.rope_scaling.factor={self.factor} needs a type: linear or llama3",
        )
