"""Vectors of one length."""

from nlscale_kernels.unit.reference import unit

__all__ = ["unit"]
