"""Rotary positions."""

from nlscale_kernels.rotary.reference import rotary_table, rotate

__all__ = ["rotary_table", "rotate"]
