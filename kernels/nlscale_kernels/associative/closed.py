"""Solutions that a memory's objective has in closed form, and what each familiar learner turns out to solve (spec 1)."""

from collections.abc import Callable

import torch
from torch import Tensor


def proximal(weight_OI: Tensor, x_I: Tensor, u_O: Tensor, rate: float) -> Tensor:
    """argmin_W <W x, u> + |W - W_t|^2 / (2 rate): a step of SGD, u the gradient at the layer's output (eqs. 8, 9)."""
    return weight_OI - rate * torch.outer(u_O, x_I)


def follow_leader(weight_OI: Tensor, pairs: list[tuple[Tensor, Tensor]], rate: float) -> Tensor:
    """argmin_W sum_s <W x_s, u_s> + |W - W_1|^2 / (2 rate), pairs (x, u) of all steps so far (eq. 3)."""
    return weight_OI - rate * sum(torch.outer(u, x) for x, u in pairs)


def momentum_memory(
    momentum: Tensor, gradient: Tensor, share: float, rate: float, feature: Callable[[Tensor], Tensor] = lambda g: g
) -> Tensor:
    """argmin_m <m, f(g)> + |m - share m_t|^2 / (2 rate): the inner level of SGD with momentum (eqs. 10, 11; A1).

    `feature` f is the identity there; another one gives momentum on a feature map of gradients (eq. 51).
    """
    return share * momentum - rate * feature(gradient)


def deep_step(
    weight: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    share: float,
    rate: float,
    output: Callable[[Tensor], Tensor] = lambda m: m,
) -> tuple[Tensor, Tensor]:
    """W <- W + f(m), m <- share m - rate g: momentum whose output passes a map f (eq. 52); the new weight and momentum.

    With the identity it is SGD with momentum, with an orthogonalisation of m (Newton-Schulz) Muon.
    """
    momentum = momentum_memory(momentum, gradient, share, rate)
    return weight + output(momentum), momentum


def adam_memory(gradients_SN: Tensor, beta: float) -> Tensor:
    """argmin_m sum_i w_i |m * g_i - P|^2, element by element, w_i = (1 - beta) beta^(t - i), P = sqrt(sum w g^2).

    The best element-wise map of past gradients to their own size (eqs. 100-105). It is Adam's m / sqrt(v) where
    beta1 = beta2 and eps = 0, and only there. S steps, N elements.
    """
    steps = gradients_SN.shape[0]
    age = torch.arange(steps - 1, -1, -1, dtype=gradients_SN.dtype, device=gradients_SN.device)
    w = ((1 - beta) * beta**age)[:, None]
    second = (w * gradients_SN.square()).sum(0)
    return (w * gradients_SN).sum(0) * second.sqrt() / second


def nearest(query_K: Tensor, keys_TK: Tensor, values_TV: Tensor, scale: float) -> Tensor:
    """argmin_m sum_i s_i |v_i - m|^2 with s_i = exp(scale <k_i, q>): softmax attention (eqs. 62, 63)."""
    s = torch.exp(scale * (keys_TK @ query_K))
    return (s @ values_TV) / s.sum()


def delta_step(weight_OI: Tensor, x_I: Tensor, u_O: Tensor, rate: float) -> Tensor:
    """argmin_W |W x + u|^2 / 2 + |W - W_t|^2 / (2 rate), u the gradient at the layer's output: W (I - a x x^T) - a u x^T
    with a = rate / (1 + rate |x|^2), exact for every |x| (eqs. 56, 57 corrected; A4).
    """
    a = rate / (1 + rate * x_I.square().sum())
    return weight_OI - a * torch.outer(weight_OI @ x_I + u_O, x_I)
