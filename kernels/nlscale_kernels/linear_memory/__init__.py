"""Matrix memories: linear attention and the gated delta rule."""

from nlscale_kernels.linear_memory.reference import (
    RULES,
    Affine,
    Tokens,
    affine,
    compose,
    erasures,
    linear_memory,
    serial,
)

__all__ = ["RULES", "Affine", "Tokens", "affine", "compose", "erasures", "linear_memory", "serial"]
