"""Rotary positions (Su et al., 2021), half-split form. T tokens, B rows, H heads, K head width."""

from collections.abc import Callable

import torch
from torch import Tensor


def rotary_table(
    tokens: int,
    width: int,
    base: float,
    device: torch.device | None = None,
    scaled: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of rotary positions (Su et al., 2021), each (T, 1, 1, K), float32.

    The first half of the sines carries the minus sign of the rotation. `scaled`: what becomes of the frequencies (K / 2,)
    in radians a token, float64; None: nothing.
    """
    frequency = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    frequency = frequency if scaled is None else scaled(frequency)
    angle = torch.outer(torch.arange(tokens, device=device, dtype=torch.float64), frequency)
    cosine, sine = angle.cos(), angle.sin()
    table = torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)
    return tuple(part.float()[:, None, None, :] for part in table)  # type: ignore[return-value]


def rotate(x_TBHK: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns the two halves of every head by its token's angle."""
    return x_TBHK * cosine + x_TBHK.roll(x_TBHK.shape[-1] // 2, -1) * sine


def rotate_both(q_TBHK: Tensor, k_TBGK: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned in one pass."""
    q, k = rotate(torch.cat([q_TBHK, k_TBGK], 2), cosine, sine).split([q_TBHK.shape[2], k_TBGK.shape[2]], dim=2)
    return q, k
