"""What a rate and an initial value mean at another width than the one they were chosen at: muP (Yang et al., 2022).

With AdamW, a weight whose inputs are as many as the model is wide moves by a rate that falls with the width, and begins
with a deviation that falls with its root; the head begins smaller still, so that logits neither vanish nor grow (table 3
of Tensor Programs V; the head's rows for untied weights). Embeddings, gains, biases and what is stacked a head (memories'
states, short convolutions) have inputs whose number no width changes: they keep both. Attention's scale needs no change
while heads keep their width, as on the ladder (64); a wider head is not part of it, and neither is depth.
"""

from nlscale.config.model import Model


def ratio(model: Model) -> float:
    """Width at which rates and deviations were chosen / width; 1 where nothing was chosen elsewhere."""
    return (model.base_width or model.width) / model.width


def meets_width(name: str) -> bool:
    """Whether a leaf sums over inputs whose number grows with the width."""
    return name.endswith(".weight") and not name.endswith("norm.weight") and name != "embed.weight"


def rate_factor(name: str, model: Model) -> float:
    """What a leaf's rate is multiplied by."""
    return ratio(model) if meets_width(name) else 1.0


def deviation_factor(name: str, model: Model) -> float:
    """What a leaf's initial standard deviation is multiplied by."""
    if not meets_width(name):
        return 1.0
    return ratio(model) if name == "head.weight" else ratio(model) ** 0.5
