"""How a block mixes tokens: the rules for sequence memories, each with its own few settings (spec 2.6, 2.9)."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from math import lcm
from typing import TYPE_CHECKING, Literal

from nlscale.config.errors import UserError, divisors, nearest, positive, require

if TYPE_CHECKING:
    from nlscale.config.model import Model

VECTORS, GATES = ("key", "value", "query"), ("rate", "keep")  # memories of self-modifying Titans that make these
MEMORIES = (*VECTORS, *GATES, "main")
ATTENDING = ("attention", "written", "titans_mag", "titans_mal")  # mixers whose attention goes by documents or a window
BLOCK = 128  # tokens of a block of its scores, which a GPU leaves out where nobody sees any of it (model/block_mask.py)
KINDS = {  # settings of a mixer's section that make its memories others
    "written": ("rule",),
    "titans": ("activation",),
    "self_modifying": ("activation", "erase", "per_layer", "unit_values"),
}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """`linear` and `delta`: a matrix a head, linear attention or the gated delta rule."""

    chunk: int = 64  # tokens computed at once; the result does not depend on it
    convolution: int = 4  # tokens that a short causal convolution of q, k and v looks at
    rate: float = 1.0  # largest inner rate; 0: the memory stays as it began
    kernels: Literal["own", "fla"] = "own"  # fla: delta by flash-linear-attention (pip install fla-core)

    def __post_init__(self) -> None:
        positive("model.linear", chunk=self.chunk, convolution=self.convolution)
        require(0 <= self.rate <= 1, f"model.linear.rate={self.rate} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Written:
    """`written`: attention, then a weight a head that the row itself writes (AdaTransformer, eq. 69)."""

    rule: Literal["linear", "delta"] = "delta"  # linear: a write adds (eq. 69); delta: it erases along its key first
    chunk: int = 64  # tokens computed at once; the result does not depend on it
    rate: float = 1.0  # largest inner rate; 0: the weight stays as it began, and the block is a Transformer's

    def __post_init__(self) -> None:
        positive("model.written", chunk=self.chunk)
        require(0 <= self.rate <= 1, f"model.written.rate={self.rate} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Titans:
    """`titans` (the memory alone) and `titans_mac`, `titans_mag`, `titans_mal`: with attention as context, gate, layer."""

    chunk: int = 64  # tokens between two moves of the memory; MAC: of a segment
    hidden: int | None = None  # units of a head's memory; unset: the head's width
    activation: Literal["silu", "gelu", "swiglu"] = "silu"  # of these units
    convolution: int = 4
    rate: float = 0.02  # largest inner rate; rate x chunk below 2, as tokens add up; 0: the memory stays as it began
    persistent: int = 4  # learned tokens that attention always sees
    taught: bool = True  # false: what makes keys, values and gates learns nothing through what they wrote (an ablation)
    recompute: int = 1  # chunks that backward computes again as one piece (MAC: each, if not 0); 0: everything is kept

    def __post_init__(self) -> None:
        positive("model.titans", chunk=self.chunk, convolution=self.convolution)
        require(self.rate >= 0, f"model.titans.rate={self.rate} must not be negative")
        for name in ("persistent", "recompute"):
            require(getattr(self, name) >= 0, f"model.titans.{name}={getattr(self, name)} must not be negative")
        require(self.hidden is None or self.hidden >= 1, f"model.titans.hidden={self.hidden} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SelfModifying:
    """`self_modifying`: self-modifying Titans, the memory of HOPE."""

    chunk: int = 64  # tokens between two moves of the main memory
    maker_chunk: int | None = None  # of the memories that make keys, values and gates; unset: chunk
    hidden: int | None = None  # units of a memory; unset: the head's width
    activation: Literal["silu", "gelu", "swiglu"] = "silu"  # of these units
    convolution: int = 4
    rate: float = 0.02  # largest inner rate; rate x chunk below 2, as tokens add up; 0: the memory stays as it began
    keep: float = 0.99  # share of a memory that a token keeps, at the start of training
    momentum: bool = True
    erase: bool = True  # Delta Gradient Descent: a write erases along its key first; false: plain gradient descent
    per_layer: bool = False  # true: a memory's second layer erases along its own inputs, too: an ablation, slower
    unit_values: bool = True  # values of length one, as keys are; false: as they come, which can grow without bound
    clip: float = 1.0  # largest norm of what a chunk adds to a matrix of a memory; 0 switches it off
    written: list[str] = field(
        default_factory=lambda: list(MEMORIES)
    )  # memories that move; the others stay as they began
    query: bool = False  # a sixth memory makes queries as others make keys; false: they are a projection of the input
    gate: bool = False  # an output gate, silu(W x)
    recompute: bool = False  # backward computes each chunk of the makers again, but for the solves; false: all is kept

    def __post_init__(self) -> None:
        positive("model.self_modifying", chunk=self.chunk, convolution=self.convolution)
        for number in ("rate", "clip"):
            value = getattr(self, number)
            require(value >= 0, f"model.self_modifying.{number}={value} must not be negative")
        require(0 < self.keep < 1, f"model.self_modifying.keep={self.keep} must lie between 0 and 1, such as 0.99")
        require(self.erase or not self.per_layer, "model.self_modifying.per_layer=true needs erase=true")
        for name in self.written:
            require(
                name in MEMORIES,
                f"model.self_modifying.written: '{name}' is no memory; choose of {', '.join(MEMORIES)}",
            )
        positive("model.self_modifying", maker_chunk=self.maker_chunk)
        require(
            self.hidden is None or self.hidden >= 1, f"model.self_modifying.hidden={self.hidden} must be at least 1"
        )

    @property
    def makers(self) -> int:
        """Tokens between two moves of the makers."""
        return self.chunk if self.maker_chunk is None else self.maker_chunk

    @property
    def vectors(self) -> tuple[str, ...]:
        """The memories that make vectors of tokens."""
        return VECTORS if self.query else VECTORS[:2]


def network_of(model: "Model") -> dict[str, object]:
    """Settings that a network's tensors do not tell, and that decide what it computes with them."""
    found = {f"model.{name}": getattr(model, name) for name in ("mixer", "heads", "activation", "variant")}
    section = model.mixer.partition("_")[0] if model.mixer.startswith("titans") else model.mixer
    return found | {
        f"model.{section}.{name}": getattr(getattr(model, section), name) for name in KINDS.get(section, ())
    }


def chunks_of(model: "Model") -> dict[str, int]:
    """Settings whose chunks must divide a row, and their values; each must divide the next."""
    if model.mixer in ("linear", "delta"):
        return {"model.linear.chunk": model.linear.chunk}
    if model.mixer == "written":
        return {"model.written.chunk": model.written.chunk}
    if model.mixer.startswith("titans"):
        return {"model.titans.chunk": model.titans.chunk}
    if model.mixer == "self_modifying":
        settings, name = model.self_modifying, "model.self_modifying"
        makers = {} if settings.maker_chunk is None else {f"{name}.maker_chunk": settings.maker_chunk}
        return {f"{name}.chunk": settings.chunk, **makers}
    return {}


def chunk_of(model: "Model") -> tuple[str, int]:
    """The largest of them; 1 where there are none."""
    return [("", 1), *chunks_of(model).items()][-1]


def fit(chunks: Iterable[int], own: int) -> bool:
    """Whether each chunk divides the next, and the last one the `own` tokens."""
    return all(later % chunk == 0 for chunk, later in pairwise([*chunks, own]))


def fitting(chunks: dict[str, int], own: int) -> str:
    """What is wrong with chunks that do not fit, and what would: another value of one of them, else of all."""
    for name in sorted(chunks, key=lambda name: (own % chunks[name] == 0, -chunks[name])):
        options = [d for d in divisors(own) if fit((chunks | {name: d}).values(), own)]
        others = [f"{each}={chunks[each]}" for each in chunks if each != name]
        wrong = f"does not divide the {own} tokens of a row" if own % chunks[name] else f"and {others[0]} do not fit"
        if options:
            return f"{name}={chunks[name]} {wrong}%s; {', '.join(map(str, options[-6:]))} would work"
    largest, found = own, dict[str, int]()
    for name in reversed(chunks):
        found[name] = largest = max(d for d in divisors(largest) if d <= chunks[name])
    given = " and ".join(f"{name}={chunk}" for name, chunk in chunks.items())
    would = " with ".join(f"{name}={chunk}" for name, chunk in reversed(found.items()))
    return f"{given} do not divide the {own} tokens of a row%s; {would} would work"


def check_chunks(model: "Model", tokens: int, ranks: int) -> None:
    """Raises UserError where chunks do not divide the tokens that one rank of `ranks` context-parallel ones walks along."""
    chunks, (_, chunk) = chunks_of(model), chunk_of(model)
    unit = ranks * chunk if model.mixer in ("linear", "delta") else lcm(ranks, chunk)
    require(
        tokens % ranks == 0,
        f"data.sequence={tokens} cannot be split over parallel.context={ranks} ranks; {nearest(tokens, unit)} would work",
    )
    own = tokens // ranks if model.mixer in ("linear", "delta") else tokens
    where = f" on each of parallel.context={ranks} ranks" if own != tokens else ""
    if not fit(chunks.values(), own):
        raise UserError(fitting(chunks, own) % where)
    require(
        own == tokens or own >= model.linear.convolution - 1,
        f"model.linear.convolution={model.linear.convolution} reaches past the {own} tokens of the rank before{where}; "
        f"{own + 1} would work",
    )


def unattended(model: "Model") -> list[str]:
    """What is said of attention where there is none, in words."""
    if model.window is None or model.mixer in (*ATTENDING, "titans_mac"):
        return []
    return [f"model.window={model.window} is what attention sees, and model.mixer={model.mixer} has none"]


def unblocked(model: "Model", tokens: int, precision: str) -> list[str]:
    """What is said of rows in which a GPU computes scores that nobody sees, in words."""
    part = "document" if model.attention == "document" else None if model.window is None else "window"
    beside = (
        model.titans.persistent if model.mixer.startswith("titans") else 0
    )  # of tokens beside the row, all are computed
    if part is None or model.mixer not in ATTENDING or beside or precision == "fp32" or tokens % BLOCK == 0:
        return []
    return [
        f"data.sequence={tokens} makes no whole blocks of {BLOCK} tokens: attention on a GPU computes all scores; with "
        f"{nearest(tokens, BLOCK)} it leaves out blocks beyond a {part}"
    ]


def unread(model: "Model", tokens: int) -> list[str]:
    """What nobody reads of what memories write, in words: they move by chunks, a row of so many tokens is one, and the next
    row begins anew.
    """
    if model.reset != "row" or not model.mixer.startswith(("titans", "self_modifying")):
        return []
    return [
        f"{name}={chunk} is a whole row: nothing reads what is written there; a part of it would have it read, "
        "or model.reset=never with data.shuffle=false"
        for name, chunk in chunks_of(model).items()
        if chunk >= tokens
    ]
