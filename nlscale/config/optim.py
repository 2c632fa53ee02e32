"""How a level's window of gradients becomes a step."""

from dataclasses import dataclass, field
from typing import Literal

from nlscale.config.errors import require

MATRIX_STATES = {
    "muon": ("momentum",),
    "m3": ("momentum", "slow_momentum", "slow_direction", "sum"),
    "m3_paper": ("momentum", "second", "slow_momentum", "slow_direction", "sum"),
    "delta_momentum": ("momentum",),
    "dmgd": ("network",),
    "dgd": (),
}
STATES = {  # what each rule remembers of a parameter, beside its master weight
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum",),
    "preconditioned": ("momentum", "second"),
    **MATRIX_STATES,
}
RULES = tuple(STATES)
MATRIX_RULES = tuple(MATRIX_STATES)  # for matrices only: embeddings, the head and vectors follow AdamW beside them


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What the rules beside AdamW ask for (spec 2.10)."""

    momentum: float = 0.95  # decay of the momentum; the paper's beta1 in M3
    second: float = 0.95  # decay of the second moment (preconditioned, m3_paper)
    slow_momentum: float = 0.9  # M3: decay of the slow momentum
    slow_gain: float = 0.2  # M3: weight of the slow direction
    slow_period: int = 16  # M3: updates between two moves of the slow momentum
    delta: float = 0.1  # delta momentum: how far one gradient erases what the momentum says along it
    inner: float = 0.5  # DMGD: rate of the momentum's own network, over its width
    iterations: int = 5  # Newton-Schulz
    eps: float = 1e-8  # added to the root of the second moment (preconditioned, m3_paper)

    def __post_init__(self) -> None:
        for name in ("momentum", "second", "slow_momentum"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.matrix.{name}={value} must lie between 0 and 1")
        for name in ("slow_period", "iterations"):
            require(getattr(self, name) >= 1, f"optim.matrix.{name}={getattr(self, name)} must be at least 1")
        require(self.eps > 0, f"optim.matrix.eps={self.eps} must be above 0")
        require(0 <= self.delta < 2, f"optim.matrix.delta={self.delta} must lie in [0, 2): beyond, momentum grows")
        for name in ("slow_gain", "inner"):
            require(getattr(self, name) >= 0, f"optim.matrix.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The rule, a schedule over the run's steps, and what a longer period means for both (spec 2.2)."""

    name: str = "adamw"  # of all levels that name no other: adamw, sgd, preconditioned, muon, m3, ...
    lr: float = 4e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # norm of a window's mean; 0 switches it off
    clip_scope: Literal["level", "global_due"] = "level"  # global_due: one norm over all levels that move at a step
    kappa: float = 0.5  # a level's rate is multiplied by period ** kappa
    time_scaled_betas: bool = False  # beta ** period: moments remember the same number of tokens at every level
    time_scaled_decay: bool = False  # weight decay x period
    reduce: Literal["defer", "hierarchical", "eager"] = "defer"
    node: int | None = None  # replicas of one node, for reduce=hierarchical; unset: those that share this machine
    phase: Literal["aligned", "staggered"] = "aligned"  # staggered: the layers of a level move at different steps
    offload: int = 0  # levels of this period or longer keep masters and moments in host memory; 0: none does
    overlap: bool = False  # the first level is reduced behind backward, by megatron-core's buffers
    bucket: int = 2**26  # parameters that one collective of a level carries at most (a block's are never cut)
    slow_weight: float = 0.5  # nested variant: how far the slow copy follows the fast one at its boundary
    second_order: bool = False  # nested variant, one process: slow copies follow the gradient through the fast steps
    matrix: Matrix = field(default_factory=Matrix)
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.02  # share of the steps
    decay: float = 0.2  # share of the steps that decay at the end (wsd)
    final: float = 0.1  # share of the rate at the last step

    def __post_init__(self) -> None:
        require(self.name in RULES, f"optim.name={self.name} is no rule; choose one of {', '.join(RULES)}")
        require(self.lr > 0, f"optim.lr={self.lr} must be above 0")
        for name in ("beta1", "beta2", "warmup", "decay", "final", "slow_weight"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name}={value} must lie between 0 and 1")
        require(max(self.beta1, self.beta2) < 1, "optim.beta1 and optim.beta2 must be below 1")
        require(self.eps > 0, f"optim.eps={self.eps} must be above 0")
        for name in ("weight_decay", "clip", "kappa", "offload"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must not be negative")
        require(self.kappa <= 2, f"optim.kappa={self.kappa} must be at most 2: a level's rate is lr x period ** kappa")
        require(self.bucket >= 1, f"optim.bucket={self.bucket} must be at least 1")
        require(self.node is None or self.node >= 1, f"optim.node={self.node} must be at least 1")
