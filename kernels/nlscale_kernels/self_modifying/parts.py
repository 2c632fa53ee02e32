"""What self-modifying Titans are given, hold and say, as values.

B rows, H heads, T tokens, C tokens of a chunk, K head width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.mlp_memory import Net


class Tokens(NamedTuple):
    """What a run of tokens brings; log_momentum None: no momentum; starts None: no document begins."""

    x: Tensor  # (B, H, T, K)
    q: Tensor  # (B, H, T, K); unheard where a memory makes queries
    log_momentum: Tensor | None = None  # (B, H, T)
    starts: Tensor | None = None  # (B, T)

    def runs(self, size: int) -> list["Tokens"]:
        """Runs of `size` tokens; one backward of a split is one copy, of a slice a row of zeros."""
        count = -(-self.x.shape[2] // size)
        if count == 1:
            return [self]
        x, q, momentum = ([None] * count if t is None else t.split(size, 2) for t in self[:3])
        starts = [None] * count if self.starts is None else self.starts.split(size, 1)
        return [Tokens(*each) for each in zip(x, q, momentum, starts, strict=True)]  # type: ignore[arg-type]

    @property
    def fresh(self) -> Tensor | None:
        """True where a token's document began among these tokens (B, T)."""
        return None if self.starts is None else self.starts.cumsum(-1) > 0


class Memories(NamedTuple):
    """The five memories of every head, or six."""

    vectors: Net  # key, value and, where it makes queries, query
    gates: Net  # rate, keep
    main: Net

    def copied(self, rows: int) -> "Memories":
        """Those of one row for many: copied once, rather than in every product."""
        return Memories(*(Net(*(part.expand(rows, *part.shape[1:]).contiguous() for part in net)) for net in self))


class State(NamedTuple):
    """The memories and, where there is momentum, theirs; and the tokens of a makers' chunk that is not whole yet, of which
    the main memory has passed the whole chunks of its own.
    """

    memories: Memories
    momentum: Memories | None
    pending: Tokens | None = None


class Still(NamedTuple):
    """Which memories stay as they began: of the makers one truth a memory, or True for all of a net; None: none does."""

    vectors: Tensor | bool | None = None
    gates: Tensor | bool | None = None
    main: bool = False


Moving = tuple[Net, Net | None]  # memories and their momentum
Caller = Callable[..., Any]  # runs a function on arguments


class Kind(NamedTuple):
    """What all memories have in common; see Gates."""

    clip: float = 0.0
    activation: str = "silu"
    per_layer: bool = False


class Gates(NamedTuple):
    """Slow constants of a head, each (H,), and what is left out of the rule."""

    rate_bias: Tensor
    keep_bias: Tensor
    rate_max: float
    erase: float = 1.0  # see writes_of
    unit_values: bool = True  # values of length one; false: as the memory says them
    clip: float = 0.0  # largest Frobenius norm of what a chunk adds to a matrix; 0: any
    still: Still = Still()
    activation: str = "silu"  # of the memories' units; gelu, or swiglu, whose W2 has gates and then units
    per_layer: bool = False  # W1 erases along its own inputs, too (per_layer.py); with `erase` 1

    @property
    def kind(self) -> Kind:
        """Of the memories."""
        return Kind(self.clip, self.activation, self.per_layer)


class Made(NamedTuple):
    """What the makers say of the tokens of a chunk: keys and values (B, H, C, K), rates and log a (B, H, C)."""

    k: Tensor
    v: Tensor
    rate: Tensor
    log_keep: Tensor

    @classmethod
    def nothing(cls, tokens: Tokens) -> "Made":
        """Of no token."""
        none = tokens.x[:, :, :0]
        return cls(none, none, none[..., 0], none[..., 0])

    def runs(self, size: int) -> list["Made"]:
        """Runs of `size` tokens."""
        if self.k.shape[2] <= size:
            return [self]
        return [Made(*each) for each in zip(*(part.split(size, 2) for part in self), strict=True)]


def directly(run: Callable[..., Any], *args: Any) -> Any:
    """The Caller that keeps everything for backward."""
    return run(*args)


def begin(initial: Memories, momentum: bool) -> State:
    """The state before any token: of one row, or of as many as `initial` has."""
    zero = Memories(*(Net(*(torch.zeros_like(part) for part in net)) for net in initial))
    return State(initial, zero if momentum else None)
