"""Matrix memories: linear attention, the gated delta rule, Delta Gradient Descent."""

from nlscale_kernels.linear_memory.memory import (
    RULES,
    Affine,
    Tokens,
    affine,
    compose,
    linear_memory,
    serial,
)
from nlscale_kernels.linear_memory.op import matrix_memory

__all__ = ["RULES", "Affine", "Tokens", "affine", "compose", "linear_memory", "matrix_memory", "serial"]
