"""Memories that are two-layer networks, several of one head side by side (spec 2.6, 2.9).

    vector memory   z -> z + W1 s(W2 z)         W2 (M, K), W1 (K, M)
    gate memory     z ->     w1 . s(W2 z)       W2 (M, K), w1 (M)

s is SiLU. They all read the same z, so their first layers are one product. The gradient of |M(k) - target|^2 / 2 is never
a matrix a token: it is kept as its two factors, and a chunk's writes are one product.

B rows (or 1: all rows share the memory), H heads, C tokens, K head width, M hidden units of a memory, V vector memories,
G gate memories, S = V + G.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Bank(NamedTuple):
    """Weights of V vector memories and G gate memories, in this order."""

    up: Tensor  # (B, H, S M, K)
    down: Tensor  # (B, H, V, K, M)
    gate: Tensor  # (B, H, G, M)

    @property
    def vectors(self) -> int:
        """V."""
        return self.down.shape[2]

    @property
    def memories(self) -> int:
        """S."""
        return self.down.shape[2] + self.gate.shape[2]


class Reading(NamedTuple):
    """What the memories say."""

    vectors: Tensor  # (B, H, V, C, K)
    gates: Tensor  # (B, H, G, C)


class Slope(NamedTuple):
    """The factors of every token's gradient."""

    key: Tensor  # (B, H, C, K): the memories' input
    before: Tensor  # (B, H, C, S M): W2 k
    active: Tensor  # (B, H, S, C, M): s(W2 k)
    vectors: Tensor  # (B, H, V, C, K): errors of the vector memories
    gates: Tensor  # (B, H, G, C): of the gate memories
    back: Tensor  # (B, H, C, S M): errors at W2's output


def split(hidden: Tensor, memories: int) -> Tensor:
    """(B, H, C, S M) -> (B, H, S, C, M): a view."""
    return hidden.unflatten(-1, (memories, -1)).transpose(2, 3)


def join(hidden: Tensor) -> Tensor:
    """The way back."""
    return hidden.transpose(2, 3).flatten(-2)


def out(bank: Bank, active: Tensor, z: Tensor) -> Reading:
    """Second layers; vector memories add their input."""
    count = bank.vectors
    vectors = z.unsqueeze(2) + active[:, :, :count] @ bank.down.mT
    return Reading(vectors, (active[:, :, count:] * bank.gate.unsqueeze(-2)).sum(-1))


def read(bank: Bank, z: Tensor) -> Reading:
    """What the memories say to z (B, H, C, K)."""
    return out(bank, split(F.silu(z @ bank.up.mT), bank.memories), z)


def slope(bank: Bank, key: Tensor, target: Reading) -> Slope:
    """Gradients of half the squared errors at every token, as factors."""
    before = key @ bank.up.mT
    active = split(F.silu(before), bank.memories)
    said = out(bank, active, key)
    vectors, gates = said.vectors - target.vectors, said.gates - target.gates
    inward = torch.cat([vectors @ bank.down, gates.unsqueeze(-1) * bank.gate.unsqueeze(-2)], 2)
    sigmoid = torch.sigmoid(before)
    back = join(inward) * (sigmoid * (1 + before * (1 - sigmoid)))
    return Slope(key, before, active, vectors, gates, back)


def first_layer(at: Slope, weight_BHC: Tensor) -> Tensor:
    """The sum of all tokens' gradients of W2, each times its weight."""
    return (at.back * weight_BHC.unsqueeze(-1)).mT @ at.key


def second_layer(at: Slope, weight_BHC: Tensor) -> tuple[Tensor, Tensor]:
    """The same of W1 and w1."""
    count, weight = at.vectors.shape[2], weight_BHC.unsqueeze(2).unsqueeze(-1)
    down = (at.vectors * weight).mT @ at.active[:, :, :count]
    gate = ((at.gates.unsqueeze(-1) * weight) * at.active[:, :, count:]).sum(-2)
    return down, gate


def mix(*terms: tuple[Tensor | float, Tensor]) -> Tensor:
    """The sum of tensors, each times a number a row and head (B, H), or one number."""
    scaled = [
        part * (factor.view(*factor.shape, *[1] * (part.ndim - 2)) if isinstance(factor, Tensor) else factor)
        for factor, part in terms
    ]
    return sum(scaled[1:], scaled[0])
