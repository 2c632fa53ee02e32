"""Memories that are two-layer networks, several of one kind and head side by side (spec 2.6, 2.9).

    vector memory   z -> z + W1 s(W2 z)       W2 (I, K), W1 (K, M)
    gate memory     z ->     W1 s(W2 z)       W2 (I, K), W1 (1, M)

s is SiLU or GELU (I = M), or SwiGLU (I = 2 M: gates, then units). The gradient of |M(k) - target|^2 / 2 is never a matrix a
token: with e = M(k) - target and b = J^T W1^T e, J the Jacobian of s at W2 k, it is e s(W2 k)^T for W1 and b k^T for W2, and
the writes of a chunk are one product. `lean.py` has the same functions with gradients written out, which keep less and pass
over memory less often.

B rows (or 1: all rows share the memory), H heads, N memories, C tokens, K head width, M units of a memory, O = K or 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Net(NamedTuple):
    """Weights of N memories a head."""

    up: Tensor  # (B, H, N, I, K)
    down: Tensor  # (B, H, N, O, M)

    @property
    def adds(self) -> bool:
        """Whether memories add their input: vector memories do."""
        return self.down.shape[-2] == self.up.shape[-1]


def swiglu(before: Tensor) -> Tensor:
    """silu(gate) up of both side by side."""
    gate, up = before.chunk(2, -1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "swiglu": swiglu}


def read(net: Net, z: Tensor, activation: str = "silu") -> Tensor:
    """What the memories say to z (B, H, C, K): (B, H, N, C, O)."""
    said = ACTIVATIONS[activation](z.unsqueeze(2) @ net.up.mT) @ net.down.mT
    return said + z.unsqueeze(2) if net.adds else said


def gathered(
    net: Net, key: Tensor, target: Tensor, arrives: Tensor, weights: Sequence[Tensor], activation: str = "silu"
) -> tuple[Tensor, list[Tensor]]:
    """Sums over the tokens of a chunk: of b arrives^T (B, H, N, I, A), and of w e s^T (B, H, N, O, M) for each weight w.

    Keys (B, H, C, K), targets (B, H, N or 1, C, O), what each token's write on W2 is multiplied by (B, H, C, A), weights
    (B, H, C).
    """
    before = key.unsqueeze(2) @ net.up.mT
    active = ACTIVATIONS[activation](before)
    error = active @ net.down.mT - target
    error = error + key.unsqueeze(2) if net.adds else error
    back = torch.func.vjp(ACTIVATIONS[activation], before)[1](error @ net.down)[0]
    first = back.mT @ arrives.unsqueeze(2)
    return first, [(error * weight.unsqueeze(2).unsqueeze(-1)).mT @ active for weight in weights]


def self_taught(
    net: Net,
    key: Tensor,
    value: Tensor,
    reach: Tensor,
    share: Tensor,
    weights: Sequence[Tensor],
    activation: str = "silu",
) -> tuple[Tensor, list[Tensor]]:
    """gathered, the targets being the memories' own answers to values (B, H, C, K); share (B, H, C) of reach arrives."""
    return gathered(net, key, read(net, value, activation), share.unsqueeze(-1) * reach, weights, activation)
