"""SwiGLU of a fused product (Shazeer, 2020)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(fused: Tensor) -> Tensor:
    """silu(gate) * up; `fused` (..., 2 U) holds gate and up side by side, the result is (..., U)."""
    gate, up = fused.chunk(2, -1)
    return F.silu(gate) * up
