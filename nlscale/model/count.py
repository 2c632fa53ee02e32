"""How many parameters and floating-point operations a network has, by formula.

FLOPs count a multiply-add as 2. A weight matrix of P elements costs 2 P a token forward and 4 P backward. Causal
attention over T tokens costs 2 x 2 T D / 2 a token and layer forward (scores and values, half of them masked), and twice
that backward. Every level's gradient enters its window at every step, so a longer period saves none of this.
"""

from nlscale.config.model import Level, Levels, Model


def parameters(model: Model, levels: list[Level]) -> dict[str, int]:
    """Parameters by level; everything outside the continuum belongs to the first."""
    assert model.vocabulary is not None
    units = Levels(levels=levels).units(model.feed_forward)
    matrices = 3 if model.activation == "swiglu" else 2
    each = {name: model.layers * matrices * model.width * count for name, count in units.items()}
    attention = model.width * model.head_width * (2 * model.heads + 2 * model.key_value_heads)
    norms = model.width * (2 * model.layers + 1)
    if model.variant == "sequential":
        norms = model.width * (model.layers + 1)
        for name, count in units.items():
            each[name] += model.layers * model.width * (count > 0)
    each[levels[0].name] += model.layers * attention + 2 * model.vocabulary * model.width + norms
    return each


def flops_a_token(model: Model, tokens: int) -> float:
    """Forward and backward of one token in a row of `tokens`; the embedding's look-up costs nothing."""
    assert model.vocabulary is not None
    matrices = 3 if model.activation == "swiglu" else 2
    attention = model.width * model.head_width * (2 * model.heads + 2 * model.key_value_heads)
    layer = attention + matrices * model.width * model.feed_forward
    return 6.0 * (model.layers * layer + model.vocabulary * model.width) + 6.0 * model.layers * tokens * model.width
