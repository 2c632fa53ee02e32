"""The ladder's rule: tokens, batch and rate of a size. A test holds the recipes 125m-plain ... 70b-hope to it.

Tokens: 20 a parameter of the plain model (Hoffmann et al., 2022). Batch and the rate of hidden matrices: the fits of Li et
al. (2025, "Step Law"): B = 0.58 D^0.571 tokens, rounded to a power of two rows, and 1.79 N^-0.713 D^0.307 with N the
parameters outside embedding and head. `optim.lr` is that rate at BASE_WIDTH by config/transfer.py, to two digits. Neither
was tuned here. A layout that needs more rows than the rule gives takes a multiple: steps fall as rows rise, and the rate
rises with their root, to MOST times its own at most: beyond, more rows help less and less.
"""

from dataclasses import dataclass
from math import ceil, log2

from nlscale.config.model import Model

BASE_WIDTH = 768
TOKENS_A_PARAMETER = 20
MOST = 2.0


@dataclass(frozen=True)
class Rule:
    """What a size trains with."""

    tokens: float
    rows: int  # a step
    steps: int
    lr: float


def rule(parameters: int, model: Model, sequence: int, rows: int | None = None) -> Rule:
    """For so many parameters; `rows`: a step, where a layout needs other than the rule's own."""
    assert model.vocabulary is not None
    inner = parameters - model.vocabulary * model.width * (1 if model.tied else 2)
    tokens = TOKENS_A_PARAMETER * parameters
    own = max(1, 2 ** round(log2(0.58 * tokens**0.571 / sequence)))
    hidden = 1.79 * inner**-0.713 * tokens**0.307
    taken = rows or own
    lr = hidden * model.width / BASE_WIDTH * min(MOST, (taken / own) ** 0.5)
    return Rule(float(tokens), taken, ceil(tokens / (taken * sequence)), float(f"{lr:.1e}"))
