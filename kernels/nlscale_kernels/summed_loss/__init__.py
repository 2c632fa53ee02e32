"""Loss of a head by chunks of tokens."""

from nlscale_kernels.summed_loss.reference import summed_loss

__all__ = ["summed_loss"]
