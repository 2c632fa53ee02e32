"""Titans' neural memory."""

from nlscale_kernels.titans.reference import Memory, Tokens, begin, look, step, titans

__all__ = ["Memory", "Tokens", "begin", "look", "step", "titans"]
