"""Memories that are small networks, several side by side."""

from nlscale_kernels.mlp_memory.reference import Bank, Reading, Slope, first_layer, mix, read, second_layer, slope

__all__ = ["Bank", "Reading", "Slope", "first_layer", "mix", "read", "second_layer", "slope"]
