"""Memories that are small networks, several side by side."""

from nlscale_kernels.mlp_memory.lean import gathered, read, self_taught
from nlscale_kernels.mlp_memory.reference import Net
from nlscale_kernels.mlp_memory.step import Step, moved

__all__ = ["Net", "Step", "gathered", "moved", "read", "self_taught"]
