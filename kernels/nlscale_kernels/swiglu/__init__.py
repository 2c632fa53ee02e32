"""Gated activation."""

from nlscale_kernels.swiglu.reference import swiglu

__all__ = ["swiglu"]
