"""A model's norms, rotary positions, SwiGLU and loss by liger-kernel in place of torch."""

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


def check_liger() -> None:
    """Raises UserError where it cannot run."""
    require(torch.cuda.is_available(), "train.liger=true needs an NVIDIA GPU; train.liger=false would work")
    require(
        liger.available(),
        'train.liger=true needs liger-kernel: pip install "nlscale[liger]"; train.liger=false would work',
    )


def adopt(model: nn.Module) -> None:
    """Puts them in. A loss over a vocabulary that is split over ranks stays megatron-core's, GELU torch's."""
    for module in model.modules():
        if isinstance(module, Norm):
            module.normed = liger.rms_norm
        elif isinstance(module, FeedForward) and module.activation is swiglu:
            module.activation = liger.swiglu
        elif isinstance(module, Attention):
            module.turned = liger.rotate_both
        elif isinstance(module, Head) and module.cross_entropy is local_cross_entropy:
            module.cross_entropy = partial(liger.cross_entropy, ignore=IGNORE)
