"""Rotary positions."""

from nlscale_kernels.rotary.reference import rotary_table, rotate, rotate_both

__all__ = ["rotary_table", "rotate", "rotate_both"]
