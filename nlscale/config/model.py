"""The network's shape."""

from dataclasses import dataclass, field, replace
from typing import Literal

from nlscale.config.errors import divisors, nearest, positive, require
from nlscale.config.inner import Inner
from nlscale.config.mixers import Linear, SelfModifying, Titans, Written
from nlscale.config.rope import RopeScaling
from nlscale.config.shapes import MIXERS

DEEPEST = 1024  # layers


@dataclass(frozen=True, kw_only=True)
class Model:
    """A mixer of tokens, then a continuum of feed-forward levels, `layers` times: HOPE-Attention, HOPE and their kin.

    `mixer`: attention (HOPE-Attention), self_modifying (HOPE), titans, titans_mac, titans_mag, titans_mal, linear, delta,
    written.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12  # of attention, or memories side by side; a recipe that says none has one for 64 of the width
    mixer: str = "attention"
    linear: Linear = field(default_factory=Linear)
    written: Written = field(default_factory=Written)
    titans: Titans = field(default_factory=Titans)
    self_modifying: SelfModifying = field(default_factory=SelfModifying)
    inner: Inner = field(default_factory=Inner)  # for levels whose unit is token
    reset: Literal["row", "never"] = "row"  # never: memories go on from row to row (row i of a step after row i before)
    writes: bool = True  # false: no memory and no token level moves inside a row (an ablation)
    window: int | None = None  # tokens that attention sees; unset: the row
    loops: int = 1  # times that a row passes the same blocks (loop Transformer)
    kv_heads: int | None = None  # grouped-query attention; unset: as many as heads
    hidden: int | None = None  # feed-forward units of all levels together; unset: 4 x width (gelu), 8/3 (swiglu)
    activation: Literal["gelu", "swiglu"] = "swiglu"
    variant: Literal["independent", "sequential", "nested"] = "independent"
    gains: bool = False  # independent variant: a learned weight a level, 1 at the start
    tied: bool = False  # the head is the embedding
    attention: Literal["document", "causal"] = (
        "document"  # document: no token looks or remembers across a document's start
    )
    vocabulary: int | None = None  # unset: data.vocabulary, or the dataset's, rounded up to a multiple of 128
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    init_std: float = 0.02
    base_width: int | None = (
        None  # width at which optim.lr and init_std were chosen (config/transfer.py); unset: this one
    )

    def __post_init__(self) -> None:
        require(self.mixer in MIXERS, f"model.mixer={self.mixer} is no mixer; choose one of {', '.join(MIXERS)}")
        counts = ("layers", "width", "heads", "loops", "window", "kv_heads", "hidden", "vocabulary", "base_width")
        positive("model", **{name: getattr(self, name) for name in (*counts, "rope_base", "norm_eps", "init_std")})
        require(self.layers <= DEEPEST, f"model.layers={self.layers} must be at most {DEEPEST}")
        require(
            self.width % (2 * self.heads) == 0,
            f"model.width={self.width} must be a multiple of 2 x model.heads={2 * self.heads} (rotary halves of a head); "
            f"{nearest(self.width, 2 * self.heads)} would work",
        )
        require(
            not self.gains or self.variant == "independent",
            f"model.gains=true needs model.variant=independent; {self.variant} chains its levels",
        )
        require(
            self.linear.kernels == "own" or self.mixer == "delta",
            f"model.linear.kernels={self.linear.kernels} needs model.mixer=delta, not {self.mixer}; own would work",
        )
        require(
            not (self.tied and self.base_width),
            "model.base_width lets the head begin and move otherwise than the embedding, which model.tied=true makes one",
        )
        require(
            self.heads % self.key_value_heads == 0,
            f"model.heads={self.heads} must be a multiple of model.kv_heads={self.key_value_heads}; "
            f"kv_heads in {divisors(self.heads)} would work",
        )

    @property
    def acting(self) -> "Model":
        """With the inner rates that act: where nothing is to be written, all of them are 0."""
        if self.writes:
            return self
        still = {
            name: replace(getattr(self, name), rate=0.0) for name in ("linear", "written", "titans", "self_modifying")
        }
        return replace(self, inner=replace(self.inner, lr=0.0), **still)

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
