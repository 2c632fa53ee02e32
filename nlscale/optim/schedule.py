"""Learning rates: pure functions of the step."""

import math

from nlscale.config.levels import Level
from nlscale.config.optim import Optim


def rate(optim: Optim, step: int, steps: int) -> float:
    """The base rate at `step` (from 1) of `steps`: linear warm-up, then cosine or warm-up-stable-decay."""
    warmup = max(1, round(optim.warmup * steps))
    if step < warmup:
        return optim.lr * step / warmup
    if optim.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        share = optim.final + (1 - optim.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay = max(1, round(optim.decay * steps))
        share = 1 - (1 - optim.final) * min(1.0, max(0.0, (step - (steps - decay)) / decay))
    return optim.lr * share


def level_rate(optim: Optim, level: Level, step: int, steps: int) -> float:
    """A level's rate: base rate x its own factor x period ** kappa (spec 2.2)."""
    return rate(optim, step, steps) * level.lr * level.steps**optim.kappa


def level_betas(optim: Optim, level: Level) -> tuple[float, float]:
    """Decay of both moments; time-scaled, they remember the same number of steps at every period (spec 2.2)."""
    power = level.steps if optim.time_scaled_betas else 1
    return optim.beta1**power, optim.beta2**power


def level_decay(optim: Optim, level: Level) -> float:
    """Weight decay of one update; time-scaled, a level loses the same share of its weights in the same time."""
    return optim.weight_decay * (level.steps if optim.time_scaled_decay else 1)
