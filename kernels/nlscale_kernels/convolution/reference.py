"""Depthwise causal convolution over the last few tokens of a document (spec 2.6). T tokens, B rows, D channels."""

import torch
from torch import Tensor


def convolve(x_TBD: Tensor, weight_DW: Tensor, before_WBD: Tensor | None, starts_TB: Tensor | None) -> Tensor:
    """y_t = sum_j weight[:, j] x_{t-j}, j = 0 ... W-1, over tokens of t's own document.

    `before`: the W-1 tokens before the first (None: there are none, zeros); `starts` is true at a document's first token
    (None: no document begins).
    """
    taps = weight_DW.shape[1]
    if before_WBD is None:
        before_WBD = x_TBD.new_zeros((taps - 1, *x_TBD.shape[1:]))
    padded, tokens = torch.cat([before_WBD, x_TBD]), x_TBD.shape[0]
    begins = None if starts_TB is None else torch.cat([starts_TB.new_zeros(taps - 1, starts_TB.shape[1]), starts_TB])
    y = padded[taps - 1 :] * weight_DW[:, 0]  # not x, which may lie in something wide that backward would keep
    gap = None
    for j in range(1, taps):
        earlier = padded[taps - 1 - j : taps - 1 - j + tokens]
        if begins is not None:  # a document that begins at any of the tokens t-j+1 ... t is between the two
            begun = begins[taps - j : taps - j + tokens]
            gap = begun if gap is None else gap | begun
            earlier = earlier.masked_fill(gap.unsqueeze(-1), 0)
        y = torch.addcmul(y, earlier, weight_DW[:, j])
    return y
