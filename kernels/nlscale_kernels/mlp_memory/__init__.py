"""Memories that are small networks, several side by side."""

from nlscale_kernels.mlp_memory.lean import gathered, read
from nlscale_kernels.mlp_memory.reference import Net, mix

__all__ = ["Net", "gathered", "mix", "read"]
