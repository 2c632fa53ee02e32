"""Transfer by generation: one level makes another's weights, or the context it learns from (spec 1, rows 9, 15, 25, 26)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlscale_kernels.associative.moves import SGD
from nlscale_kernels.associative.reference import Associative, Gates, Weights, dot, linear


def generated(generator: Weights, z_Z: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """A hypernetwork g_phi(z): every weight of the target network, linear in its embedding z (Ha et al., 2016).

    `generator`: name -> phi (numel of the weight, Z); `shapes`: name -> the weight's shape. Learning phi is a slower level
    than what the generated network does with its weights.
    """
    return {name: (generator[name] @ z_Z).view(shape) for name, shape in shapes.items()}


def programmed(generator_FD: Tensor, x_TD: Tensor, q_TK: Tensor, rate: Tensor | float = 1.0) -> Tensor:
    """A fast weight programmer: a hypernetwork that generates, from each token, a change of rank one (Schmidhuber, 1992).

    theta_t = theta_{t-1} + rate v_t k_t^T with (k_t, v_t) = phi x_t, F = K + V features; theta_0 = 0. Outputs (T, V).
    """
    sizes = {"key": q_TK.shape[1], "value": generator_FD.shape[0] - q_TK.shape[1]}
    generator = dict(zip(sizes, generator_FD.split(list(sizes.values())), strict=True))
    made = [generated(generator, x, {name: (size,) for name, size in sizes.items()}) for x in x_TD]
    k_TK, v_TV = (torch.stack([each[name] for each in made]) for name in sizes)
    return written_in_context(q_TK, k_TK, v_TV, x_TD.new_zeros(sizes["value"], sizes["key"]), rate)


def written_in_context(y_TK: Tensor, k_TK: Tensor, v_TV: Tensor, slow_VK: Tensor, rate: Tensor | float) -> Tensor:
    """A block's second half whose weight the row itself writes (AdaTransformer, eq. 69): W_t y_t (T, V), where

        W_t = W_{t-1} + rate v_t k_t^T,    W_0 = `slow_VK`,

    and y (T, K) is what attention said. At rate 0 it is the slow weight's product, a Transformer's; with W_0 = 0 it is
    linear attention on y.
    """
    memory = Associative(linear, dot, SGD)
    state, said = memory.begin({"up": slow_VK}), []
    for y, key, value in zip(y_TK, k_TK, v_TV, strict=True):
        state = memory.write(state, key, value, Gates(rate))
        said.append(memory.read(state, y))
    return torch.stack(said)
