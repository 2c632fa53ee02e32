"""How a block mixes tokens: the rules for sequence memories, each with its own few settings (spec 2.6, 2.9)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, Literal

from nlscale.config.errors import divisors, nearest, positive, require

if TYPE_CHECKING:
    from nlscale.config.model import Model

Shapes = dict[str, tuple[int, ...]]


VECTORS, GATES = ("key", "value", "query"), ("rate", "keep")  # memories of self-modifying Titans that make these
MEMORIES = (*VECTORS, *GATES, "main")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """`linear` and `delta`: a matrix a head, linear attention or the gated delta rule."""

    chunk: int = 64  # tokens computed at once; the result does not depend on it
    convolution: int = 4  # tokens that a short causal convolution of q, k and v looks at
    rate: float = 1.0  # largest inner rate; 0: the memory stays as it began
    kernels: Literal["own", "fla"] = "own"  # fla: delta by flash-linear-attention (pip install "nlscale[fla]")

    def __post_init__(self) -> None:
        positive("model.linear", chunk=self.chunk, convolution=self.convolution)
        require(0 <= self.rate <= 1, f"model.linear.rate={self.rate} must lie between 0 and 1")


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
        for name in self.written:
            require(
                name in MEMORIES,
                f"model.self_modifying.written: '{name}' is no memory; choose of {', '.join(MEMORIES)}",
            )
        makers = self.maker_chunk
        require(
            makers is None or (makers >= 1 and makers % self.chunk == 0),
            f"model.self_modifying.maker_chunk={makers} must be a multiple of model.self_modifying.chunk={self.chunk}; "
            f"{nearest(max(makers or 0, 0), self.chunk)} would work",
        )
        require(
            self.hidden is None or self.hidden >= 1, f"model.self_modifying.hidden={self.hidden} must be at least 1"
        )

    @property
    def makers(self) -> int:
        """Tokens between two moves of the makers."""
        return self.maker_chunk or self.chunk

    @property
    def vectors(self) -> tuple[str, ...]:
        """The memories that make vectors of tokens."""
        return VECTORS if self.query else VECTORS[:2]


def chunk_of(model: "Model") -> tuple[str, int]:
    """The setting whose chunks must divide a row, and its value; 1 where there are none."""
    if model.mixer in ("linear", "delta"):
        return "model.linear.chunk", model.linear.chunk
    if model.mixer.startswith("titans"):
        return "model.titans.chunk", model.titans.chunk
    if model.mixer == "self_modifying":
        name = "maker_chunk" if model.self_modifying.maker_chunk else "chunk"
        return f"model.self_modifying.{name}", model.self_modifying.makers
    return "", 1


def check_chunks(model: "Model", tokens: int, ranks: int) -> None:
    """Raises UserError where chunks do not divide the tokens that one rank of `ranks` context-parallel ones walks along."""
    name, chunk = chunk_of(model)
    unit = ranks * chunk if model.mixer in ("linear", "delta") else lcm(ranks, chunk)
    require(
        tokens % ranks == 0,
        f"data.sequence={tokens} cannot be split over parallel.context={ranks} ranks; {nearest(tokens, unit)} would work",
    )
    own = tokens // ranks if model.mixer in ("linear", "delta") else tokens
    where = f" on each of parallel.context={ranks} ranks" if own != tokens else ""
    require(
        own % chunk == 0,
        f"{name}={chunk} does not divide the {own} tokens of a row{where}; "
        f"{', '.join(str(d) for d in divisors(own)[-6:])} would work",
    )
    require(
        own == tokens or own >= model.linear.convolution - 1,
        f"model.linear.convolution={model.linear.convolution} reaches past the {own} tokens of the rank before{where}; "
        f"{own + 1} would work",
    )


def projections(model: "Model", *parts: str) -> Shapes:
    """Column-parallel weights of a head's width, and the output's."""
    inner = model.heads * model.head_width
    shapes: Shapes = {f"{part}.weight": (inner, model.width) for part in parts}
    return shapes | {"out.weight": (model.width, inner)}


def gates(model: "Model", *parts: str) -> Shapes:
    """Weights and biases of one number a head and token."""
    shapes: Shapes = {}
    for part in parts:
        shapes |= {f"{part}.weight": (model.heads, model.width), f"{part}.bias": (model.heads,)}
    return shapes


def convolutions(model: "Model", taps: int, *parts: str) -> Shapes:
    """Taps of the short convolutions."""
    return {f"convolution.{part}": (model.heads * model.head_width, taps) for part in parts}


def units_of(settings: Titans | SelfModifying, width: int) -> tuple[int, int]:
    """Rows of a memory's W2 and columns of its W1: for SwiGLU gates and units, else both its units."""
    units = settings.hidden or width
    return (2 if settings.activation == "swiglu" else 1) * units, units


def memory(
    model: "Model", settings: Titans | SelfModifying, vectors: tuple[str, ...], gate: tuple[str, ...] = ()
) -> Shapes:
    """Initial states of memories: all heads one below the other."""
    heads, width = model.heads, model.head_width
    inward, units = units_of(settings, width)
    shapes: Shapes = {}
    for name in (*vectors, *gate):
        shapes[f"memory.{name}.up"] = (heads * inward, width)
        shapes[f"memory.{name}.down"] = (heads * width, units) if name in vectors else (heads, units)
    return shapes


NORM = "norm.weight"


def attention(model: "Model") -> Shapes:
    """Attention's own parameters."""
    pairs = model.key_value_heads * model.head_width
    inner = model.heads * model.head_width
    return {
        NORM: (model.width,),
        "q.weight": (inner, model.width),
        "k.weight": (pairs, model.width),
        "v.weight": (pairs, model.width),
        "out.weight": (model.width, inner),
    }


def linear(model: "Model") -> Shapes:
    """Parameters of `linear` and `delta`."""
    return {
        NORM: (model.width,),
        **projections(model, "q", "k", "v", "gate"),
        **gates(model, "rate", "keep"),
        **convolutions(model, model.linear.convolution, "q", "k", "v"),
        "memory.start": (model.heads * model.head_width, model.head_width),
    }


def titans(model: "Model") -> Shapes:
    """Parameters of the memory alone."""
    return {
        NORM: (model.width,),
        **projections(model, "q", "k", "v", "gate"),
        **gates(model, "rate", "momentum", "keep"),
        **convolutions(model, model.titans.convolution, "q", "k", "v"),
        **memory(model, model.titans, ("main",)),
    }


def persistent(model: "Model") -> Shapes:
    """Keys and values that attention always sees."""
    shape: tuple[int, ...] = (model.heads * model.titans.persistent, model.head_width)
    return dict.fromkeys(("persistent.k", "persistent.v"), shape) if model.titans.persistent else {}


def titans_mag(model: "Model") -> Shapes:
    """Memory as a gate."""
    gains = {f"gain.{part}": (model.heads, model.head_width) for part in ("attention", "memory")}
    shapes = titans(model) | projections(model, "attention_q", "attention_k", "attention_v") | persistent(model) | gains
    del shapes["gate.weight"]
    return shapes


def titans_mac(model: "Model") -> Shapes:
    """Memory as context."""
    square = (model.heads * model.head_width, model.head_width)
    inside = {f"memory.{part}": square for part in ("context_k", "context_v", "write_k", "write_v", "read_q")}
    gains = {f"gain.{part}": (model.heads, model.head_width) for part in ("attention", "memory")}
    return {
        NORM: (model.width,),
        **projections(model, "q", "k", "v", "recall"),
        **gates(model, "rate", "momentum", "keep"),
        **inside,
        **memory(model, model.titans, ("main",)),
        **persistent(model),
        **gains,
    }


def titans_mal(model: "Model") -> Shapes:
    """Memory as a layer before attention."""
    first = {f"recall.{name}": shape for name, shape in titans(model).items()}
    inner = model.heads * model.head_width
    then = {NORM: (model.width,), **projections(model, "q", "k", "v"), **persistent(model)}
    then["out.weight"] = (model.width, inner)
    return first | {f"attend.{name}": shape for name, shape in then.items()}


def self_modifying(model: "Model") -> Shapes:
    """Parameters of self-modifying Titans."""
    settings = model.self_modifying
    return {
        NORM: (model.width,),
        **projections(model, "input", *([] if settings.query else ["q"]), *(["gate"] if settings.gate else [])),
        **(gates(model, "momentum") if settings.momentum else {}),
        **convolutions(model, settings.convolution, "input"),
        **memory(model, settings, (*settings.vectors, "main"), GATES),
        "rate.bias": (model.heads,),
        "keep.bias": (model.heads,),
    }


MIXERS: dict[str, Callable[["Model"], Shapes]] = {
    "attention": attention,
    "linear": linear,
    "delta": linear,
    "titans": titans,
    "titans_mac": titans_mac,
    "titans_mag": titans_mag,
    "titans_mal": titans_mal,
    "self_modifying": self_modifying,
}


def mixer_shapes(model: "Model") -> Shapes:
    """Global shapes of a block's mixer's parameters, by their names below `blocks.N.mix`."""
    return MIXERS[model.mixer](model)
