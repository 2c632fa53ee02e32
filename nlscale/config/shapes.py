"""Parameters of every mixer by name, and their global shapes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from nlscale.config.mixers import GATES, SelfModifying, Titans

if TYPE_CHECKING:
    from nlscale.config.model import Model

Shapes = dict[str, tuple[int, ...]]


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


def written(model: "Model") -> Shapes:
    """Parameters of attention whose output a written weight turns."""
    return {
        NORM: (model.width,),
        **projections(model, "q", "k", "v"),
        **gates(model, "rate"),
        "memory.slow": (model.heads * model.head_width, model.head_width),
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
    "written": written,
    "titans": titans,
    "titans_mac": titans_mac,
    "titans_mag": titans_mag,
    "titans_mal": titans_mal,
    "self_modifying": self_modifying,
}


def mixer_shapes(model: "Model") -> Shapes:
    """Global shapes of a block's mixer's parameters, by their names below `blocks.N.mix`."""
    return MIXERS[model.mixer](model)
