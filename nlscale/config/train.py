"""The loop, its checkpoints and what it writes."""

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from nlscale.config.errors import positive, require

SEEDS = 2**31  # what all generators of the libraries take, with what is added to it
LIGER = ("norm", "rotary", "swiglu", "loss")


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, with how many rows, at which precision."""

    steps: int = 1000
    stop_at: int | None = None  # save and end after this step; the same command without it goes on
    seed: int = 1234
    global_batch: int = 256  # sequences a step, over all replicas
    micro_batch: int = 1  # sequences a forward pass on one replica
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: Literal["none", "block"] = "none"  # block: activations inside a block are computed again in backward
    compile: Literal["none", "block"] = "none"  # block: torch.compile of each block, once a layout and shape
    activation_budget: float = 1.0  # compile: share of what backward wants that is kept; below 1 some is made anew
    kernels: Literal["fused", "reference"] = (
        "fused"  # reference: plain torch in place of every kernel, to find a wrong one
    )
    liger: list[str] = field(
        default_factory=list
    )  # what liger-kernel computes in place of torch: norm, rotary, swiglu, loss
    spike: float = 10.0  # robust standard deviations above the last losses from which a loss is a spike; 0: none is
    on_spike: Literal["flag", "rollback"] = "flag"  # rollback: to the last good checkpoint, passing over the rows since
    compare: int = 100  # steps between comparisons of the weights that ranks hold in common; 0: never
    evaluate_interval: int = 0  # steps between held-out losses; 0: only at the end
    evaluate_rows: int = 64

    def __post_init__(self) -> None:
        counts = ("steps", "global_batch", "micro_batch", "stop_at")
        positive("train", **{name: getattr(self, name) for name in counts})
        require(self.seed < SEEDS, f"train.seed={self.seed} must be below {SEEDS}")
        for name in ("evaluate_interval", "evaluate_rows", "spike", "compare", "seed"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative")
        require(
            0 <= self.activation_budget <= 1,
            f"train.activation_budget={self.activation_budget} is a share of what backward wants, from 0 to 1",
        )
        require(
            self.activation_budget == 1 or self.compile != "none",
            f"train.activation_budget={self.activation_budget} is of torch.compile: it needs train.compile=block",
        )
        for name in self.liger:
            require(name in LIGER, f"train.liger: liger-kernel is not asked for '{name}'; choose of {', '.join(LIGER)}")
        require(
            not self.liger or self.kernels == "fused",
            "train.liger with train.kernels=reference would run torch; train.liger=[] would work",
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, and how much to keep."""

    interval: int = 500  # steps; the last step is always saved
    keep: int = 3  # newest checkpoints kept; 0 keeps all
    asynchronous: bool = True  # a save is copied to the host, and written while the run goes on; false: the run waits
    upload: str = (
        ""  # where saves are sent, too, by any name that fsspec knows, such as s3://bucket/runs; under the run's name
    )
    keep_every: int = 0  # checkpoints at multiples of so many steps are kept besides; 0: none
    windows: Literal["each", "total"] = "each"  # each: every replica's open windows, so that a resume is bit-exact;
    # total: their sum, equal up to rounding, which does not grow with replicas
    levels: Literal["same", "change"] = "same"  # change: a resume may find other periods, frozen or new levels
    data: Literal["same", "change"] = "same"  # change: a resume may find another dataset, whose rows then begin anew

    def __post_init__(self) -> None:
        require(self.interval >= 1, f"checkpoint.interval={self.interval} must be at least 1")
        for name in ("keep", "keep_every"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}={getattr(self, name)} must not be negative")
        parts = [urlsplit(part) for part in self.upload.split("::")]
        require(
            not any("@" in part.netloc or part.query for part in parts),
            "checkpoint.upload holds a user, a key or a query, which would be written to config.yaml; keys belong in the "
            "environment, where the storage's library looks for them",
        )


@dataclass(frozen=True, kw_only=True)
class Log:
    """What a person sees, and how often."""

    interval: int = 10  # steps between lines where there is no terminal
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "nlscale"
    trace: list[int] = field(default_factory=list)  # steps whose profiler trace each rank writes into its logs
    alignment: bool = False  # cosine of neighbouring levels' moves (train/alignment.py), a copy of their weights
    surprise: bool = False  # size of the gradient at every block's output (train/surprise.py)
    allocations: int = 0  # newest of a GPU's memory whose stacks a snapshot shows when memory runs out; 0: none
    peak_flops: float | None = None  # of one device at the run's precision; unset: by the device's name, or measured

    def __post_init__(self) -> None:
        positive("log", interval=self.interval, trace=self.trace, peak_flops=self.peak_flops)
        require(self.allocations >= 0, f"log.allocations={self.allocations} must not be negative, such as 100000")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What the run is called and where it lives."""

    name: str = "run"
    folder: str | None = None  # unset: runs/NAME

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        require(plain, f"run.name={self.name!r} names a folder in runs/: it has no slash and is not '.' or '..'")
