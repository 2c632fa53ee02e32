"""Loss of a linear head, chunk by chunk."""

from nlscale_kernels.summed_loss.reference import summed_loss, whole_loss

__all__ = ["summed_loss", "whole_loss"]
