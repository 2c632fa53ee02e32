"""How a level's window of gradients becomes a step."""

from dataclasses import dataclass
from typing import Literal

from nlscale.config.errors import require


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, a schedule over the run's steps, and what a longer period means for the rate (spec 2.2)."""

    name: Literal["adamw"] = "adamw"
    lr: float = 4e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # norm of a level's window mean; 0 switches it off
    kappa: float = 0.5  # a level's rate is multiplied by period ** kappa
    reduce: Literal["defer"] = "defer"
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.02  # share of the steps
    decay: float = 0.2  # share of the steps that decay at the end (wsd)
    final: float = 0.1  # share of the rate at the last step

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr} must be above 0")
        for name in ("beta1", "beta2", "warmup", "decay", "final"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name}={value} must lie between 0 and 1")
        require(max(self.beta1, self.beta2) < 1, "optim.beta1 and optim.beta2 must be below 1")
        for name in ("weight_decay", "clip", "kappa", "eps"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must not be negative")
