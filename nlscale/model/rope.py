"""Frequencies of rotary positions that reach beyond the rows of an earlier training."""

from functools import partial
from math import pi

import torch
from nlscale_kernels.rotary import rotary_table
from torch import Tensor

from nlscale.config.model import Model
from nlscale.config.rope import RopeScaling


def rotary_of(model: Model, tokens: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The tables of a model's positions: cosines and signed sines, each (T, 1, 1, K)."""
    scaled = partial(SCALINGS[model.rope_scaling.type], model.rope_scaling)
    return rotary_table(tokens, model.head_width, model.rope_base, device, scaled)


def none(_: RopeScaling, frequency: Tensor) -> Tensor:
    """As they are."""
    return frequency


def linear(scaling: RopeScaling, frequency: Tensor) -> Tensor:
    """Position interpolation (Chen et al., 2023)."""
    return frequency / scaling.factor


def llama3(scaling: RopeScaling, frequency: Tensor) -> Tensor:
    """Long waves are made `factor` times as long, short ones stay (Llama 3.1, 2024); `waves`: how many of them fit into
    the rows of the earlier training.
    """
    waves = scaling.original * frequency / (2 * pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((waves - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


SCALINGS = {"none": none, "linear": linear, "llama3": llama3}
