"""Short causal convolution."""

from nlscale_kernels.convolution.reference import convolve

__all__ = ["convolve"]
