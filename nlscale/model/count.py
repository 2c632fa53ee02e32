"""How many parameters and floating-point operations a network has, by formula.

FLOPs count a multiply-add as 2. A weight matrix of P elements costs 2 P a token forward and 4 P backward. Causal
attention over T tokens costs 2 x 2 T D / 2 a token and layer forward (scores and values, half of them masked), and twice
that backward. Every level's gradient enters its window at every step, so a longer period saves none of this.
"""

from nlscale.config.levels import Level, Levels, level_of, parameter_names
from nlscale.config.model import Model


def parameters(model: Model, levels: list[Level]) -> dict[str, int]:
    """Parameters by level."""
    each = dict.fromkeys((level.name for level in levels), 0)
    for name in parameter_names(model, levels):
        each[level_of(name, levels).name] += elements(name, model, levels)
    return each


def elements(name: str, model: Model, levels: list[Level]) -> int:
    """Elements of one parameter."""
    assert model.vocabulary is not None
    *_, owner, part, _ = ("", *name.split("."))[-4:] if name.count(".") > 1 else ("", "", name.split(".")[0], "")
    if part in ("embed", "head"):
        return model.vocabulary * model.width
    if name.endswith(".gains"):
        return sum(level.width > 0 for level in levels)
    if part == "norm":
        return model.width
    if part in ("q", "out", "k", "v"):
        return model.width * model.head_width * (model.heads if part in ("q", "out") else model.key_value_heads)
    return model.width * Levels(levels=levels).units(model.feed_forward)[owner]


def flops_a_token(model: Model, tokens: int) -> float:
    """Forward and backward of one token in a row of `tokens`; the embedding's look-up costs nothing."""
    assert model.vocabulary is not None
    matrices = 3 if model.activation == "swiglu" else 2
    attention = model.width * model.head_width * (2 * model.heads + 2 * model.key_value_heads)
    layer = attention + matrices * model.width * model.feed_forward
    return 6.0 * (model.layers * layer + model.vocabulary * model.width) + 6.0 * model.layers * tokens * model.width
