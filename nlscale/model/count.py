"""How many parameters and floating-point operations a network has, by formula.

FLOPs count a multiply-add as 2. A weight matrix of P elements costs 2 P a token forward and 4 P backward. Causal
attention over T tokens costs 2 x 2 T D / 2 a token and layer forward (scores and values, half of them masked), and twice
that backward. A memory's writes count as what they are, products. Every level's gradient enters its window at every step,
so a longer period saves none of this. What is computed again to save memory is not counted: MFU speaks of useful work.
Levels that move inside a row add a backward pass of their own through what comes after them, and their writes.
"""

from collections.abc import Callable
from math import prod

from nlscale.config.levels import Level, Levels, learning, level_of, parameter_names
from nlscale.config.model import Model
from nlscale.config.shapes import mixer_shapes, units_of


def parameters(model: Model, levels: list[Level]) -> dict[str, int]:
    """Parameters by level."""
    each, elements = dict.fromkeys((level.name for level in levels), 0), sizes(model, levels)
    for name in parameter_names(model, levels):
        each[level_of(name, levels).name] += elements(name)
    return each


def sizes(model: Model, levels: list[Level]) -> Callable[[str], int]:
    """What tells the elements of a parameter by its name."""
    assert model.vocabulary is not None
    vocabulary, mixer = model.vocabulary, {name: prod(shape) for name, shape in mixer_shapes(model).items()}
    units, several = Levels(levels=levels).units(model.feed_forward), sum(level.width > 0 for level in levels)

    def elements(name: str) -> int:
        if name in ("embed.weight", "head.weight"):
            return vocabulary * model.width
        if name == "norm.weight":
            return model.width
        _, _, half, rest = name.split(".", 3)
        if half == "mix":
            return mixer[rest]
        if rest == "gains":
            return several
        return model.width * (1 if rest.endswith("norm.weight") else units[rest.split(".")[0]])

    return elements


def attention_flops(model: Model, tokens: int) -> float:
    """Scores and values of one token in one layer, forward; half of them are masked."""
    seen = min(tokens, 2 * model.window) if model.window else tokens
    return 2.0 * seen * model.heads * model.head_width


def matrix_flops(model: Model, chunk: int, rule: str) -> float:
    """Scores, values, keys against keys and the solve inside a chunk; reading, asking and writing the state."""
    width, erases = model.head_width, rule == "delta"
    inside = (2 + 2 + (2 + 1 if erases else 0)) * chunk * width
    return float(model.heads * (inside + (6 if erases else 4) * width * width))


def linear_flops(model: Model, tokens: int) -> float:
    """A matrix memory."""
    return matrix_flops(model, model.linear.chunk, model.mixer)


def written_flops(model: Model, tokens: int) -> float:
    """Attention, and a matrix memory that attention's output is put to."""
    return attention_flops(model, tokens) + matrix_flops(model, model.written.chunk, model.written.rule)


def titans_flops(model: Model, tokens: int) -> float:
    """Five passes of a two-layer network, two kinds of writes (spec 3.5): four products by W2, five by W1."""
    inward, units = units_of(model.titans, model.head_width)
    return 2.0 * model.heads * model.head_width * (4 * inward + 5 * units)


def mac_flops(model: Model, tokens: int) -> float:
    """The memory, read twice, five matrices a head, attention inside a segment."""
    width, chunk = model.head_width, model.titans.chunk
    inside = 10 * width * width + 4 * (2 * chunk + model.titans.persistent) * width
    again = 2.0 * width * sum(units_of(model.titans, width))
    return titans_flops(model, tokens) + model.heads * (inside + again)


def beside_flops(model: Model, tokens: int) -> float:
    """A memory and attention."""
    return titans_flops(model, tokens) + attention_flops(model, tokens)


def self_modifying_flops(model: Model, tokens: int) -> float:
    """Of a head: three memories of vectors (four, where one makes queries) are asked for answers, for keys and for values,
    and written; two of gates, whose W1 is a row; keys against keys and one solve a chunk of each size (spec 3.4, with W1
    multiplied once for two answers); what turns every W2 at a chunk's end, and the turning.
    """
    settings, width = model.self_modifying, model.head_width
    inward, units = units_of(settings, width)
    vectors, makers = len(settings.vectors) + 1, len(settings.vectors) + 2
    each = vectors * (8 * (inward + units) + 2 * units * settings.momentum)  # momentum's share of W1 is one more
    each += 2 * 8 * inward
    solves = sum(3 * chunk for chunk in {settings.makers, settings.chunk})
    turns = 2 * width + 2 * width * inward * (makers / settings.makers + 1 / settings.chunk)
    memories = vectors + 2  # W1's inputs against each other, a solve, and what turns W1, of each
    layers = memories * units * (5 * settings.chunk + 2 * units + 2 * width) if settings.per_layer else 0
    return float(model.heads * (width * (each + solves + turns) + layers))


FLOPS: dict[str, Callable[[Model, int], float]] = {
    "attention": attention_flops,
    "linear": linear_flops,
    "delta": linear_flops,
    "written": written_flops,
    "titans": titans_flops,
    "titans_mac": mac_flops,
    "titans_mag": beside_flops,
    "titans_mal": beside_flops,
    "self_modifying": self_modifying_flops,
}


def flops_a_token(model: Model, levels: list[Level], tokens: int) -> float:
    """Forward and backward of one token in a row of `tokens`; the embedding's look-up costs nothing."""
    layer, head = layer_flops(model, tokens), head_flops(model)
    return 3.0 * (model.layers * model.loops * layer + head) + inner_flops(model, levels, tokens)


def layer_flops(model: Model, tokens: int) -> float:
    """A block, one token forward."""
    weights = sum(
        prod(shape) for name, shape in mixer_shapes(model).items() if name.endswith(".weight") and len(shape) == 2
    )
    return 2.0 * (weights + inward(model) * model.width * model.feed_forward) + FLOPS[model.mixer](model, tokens)


def inward(model: Model) -> int:
    """Matrices of a feed-forward, all of one size."""
    return 3 if model.activation == "swiglu" else 2


def head_flops(model: Model) -> float:
    """Logits of one token."""
    assert model.vocabulary is not None
    return 2.0 * model.vocabulary * model.width


def inner_flops(model: Model, levels: list[Level], tokens: int) -> float:
    """What levels that move inside a row cost beside their outer training (spec 2.3), one token.

    The loss goes back to every such level: through the adaptive blocks but the lowest, and the lowest one's output
    projection of these levels; what the head says of the loss is the outer gradient's, too. Then each level writes the
    products of its pairs. The last chunk of a row teaches nobody, unless memories go on. With the full meta-gradient all of
    it, the head included, is differentiated once more.
    """
    moving = learning(levels)
    if not moving:
        return 0.0
    units = Levels(levels=levels).units(model.feed_forward)
    own, blocks = sum(units[level.name] for level in moving), model.inner.adaptive(model.layers)
    back = (blocks - 1) * layer_flops(model, tokens) + 2.0 * model.width * own
    written = 2.0 * blocks * inward(model) * model.width * own
    taught = 1.0 if model.reset == "never" else 1 - moving[0].period / tokens
    again = 3.0 * (back + written + head_flops(model)) if model.inner.meta == "full" else back + written
    return taught * again
