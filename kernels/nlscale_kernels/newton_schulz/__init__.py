"""Orthogonalisation by Newton-Schulz iteration."""

from nlscale_kernels.newton_schulz.op import orthogonal, symmetric_product
from nlscale_kernels.newton_schulz.reference import QUINTIC

__all__ = ["QUINTIC", "orthogonal", "symmetric_product"]
