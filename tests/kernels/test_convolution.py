"""The short convolution against torch's own, document by document; runs shorter than its reach."""

import pytest
import torch
import torch.nn.functional as F
from nlscale_kernels.convolution import convolve
from torch import Tensor


def apart(x_TBD: Tensor, weight_DW: Tensor, starts_TB: Tensor) -> Tensor:
    """torch's convolution over each document of each row by itself."""
    tokens, rows, width = x_TBD.shape
    y = torch.empty_like(x_TBD)
    for row in range(rows):
        bounds = [0, *(t for t in range(1, tokens) if starts_TB[t, row]), tokens]
        for first, last in zip(bounds, bounds[1:], strict=False):
            document = F.pad(x_TBD[first:last, row].t(), (weight_DW.shape[1] - 1, 0))
            y[first:last, row] = F.conv1d(document, weight_DW.flip(1).unsqueeze(1), groups=width).t()
    return y


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_documents_are_convolved_apart(taps: int, tokens: int) -> None:
    torch.manual_seed(taps)
    x, weight = torch.randn(tokens, 2, 3, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64)
    starts = torch.zeros(tokens, 2, dtype=torch.bool)
    starts[0, 0] = starts[tokens // 2, 1] = starts[-1, 0] = True
    torch.testing.assert_close(convolve(x, weight, None, starts), apart(x, weight, starts), rtol=0, atol=1e-14)
    nowhere = torch.zeros_like(starts)
    torch.testing.assert_close(convolve(x, weight, None, None), apart(x, weight, nowhere), rtol=0, atol=1e-14)
    for cut in range(1, tokens):
        before = torch.cat([x.new_zeros(taps - 1, 2, 3), x[:cut]])[cut:]
        rest = convolve(x[cut:], weight, before, None)
        torch.testing.assert_close(rest, apart(x, weight, nowhere)[cut:], rtol=0, atol=1e-14)
