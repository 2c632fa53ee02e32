"""A model's norms, rotary positions, SwiGLU and loss by liger-kernel in place of torch."""

from collections.abc import Collection
from functools import partial

import torch
from nlscale_kernels import liger
from nlscale_kernels.swiglu import swiglu
from torch import nn

from nlscale.config.errors import require
from nlscale.model.attention import Attention
from nlscale.model.continuum import FeedForward
from nlscale.model.layers import Norm
from nlscale.model.loss import IGNORE, Head, local_cross_entropy


def check_liger(parts: Collection[str]) -> None:
    """Raises UserError where `parts` are asked for and cannot run."""
    said = f"train.liger=[{','.join(parts)}]"
    require(not parts or torch.cuda.is_available(), f"{said} needs an NVIDIA GPU; train.liger=[] would work")
    require(
        not parts or liger.available(),
        f"{said} needs liger-kernel: `pip install liger-kernel`; train.liger=[] would work",
    )


def adopt(model: nn.Module, parts: Collection[str]) -> None:
    """Puts `parts` (config.train.LIGER) in. A loss over a vocabulary that is split over ranks stays megatron-core's, GELU
    torch's; the norms and rotations inside memories stay their own.
    """
    for module in model.modules():
        if isinstance(module, Norm) and "norm" in parts:
            module.normed = liger.rms_norm
        elif isinstance(module, FeedForward) and "swiglu" in parts and module.activation is swiglu:
            module.activation = liger.swiglu
        elif isinstance(module, Attention) and "rotary" in parts:
            module.turned = liger.rotate_both
        elif isinstance(module, Head) and "loss" in parts and module.cross_entropy is local_cross_entropy:
            module.cross_entropy = partial(liger.cross_entropy, ignore=IGNORE)
