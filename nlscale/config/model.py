"""The network's shape."""

from dataclasses import dataclass
from typing import Literal

from nlscale.config.errors import divisors, nearest, require


@dataclass(frozen=True, kw_only=True)
class Model:
    """HOPE-Attention: attention, then a continuum of feed-forward levels, `layers` times (spec 2.8)."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None  # grouped-query attention; unset: as many as heads
    hidden: int | None = None  # feed-forward units of all levels together; unset: 4 x width (gelu), 8/3 (swiglu)
    activation: Literal["gelu", "swiglu"] = "swiglu"
    variant: Literal["independent", "sequential", "nested"] = "independent"
    gains: bool = False  # independent variant: a learned weight a level, 1 at the start
    tied: bool = False  # the head is the embedding
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
            not self.gains or self.variant == "independent",
            f"model.gains=true needs model.variant=independent; {self.variant} chains its levels",
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
