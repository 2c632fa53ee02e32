"""The local surprise of every block: how strongly the loss asks for another output (Behrouz et al., 2025, eqs. 8, 29).

u = d loss / d output of a token is what backpropagation has each block's memories learn: their values, up to a rate. Its
size over depth shows where a network has most to learn, and where the signal fades or grows.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.model.hope import Block, Hope
from nlscale.runtime.world import World


class Surprise:
    """Root mean squares over tokens of |u|, of each block whose levels do not move inside the row.

    A loop passes a block several times: every pass of a token counts.
    """

    def __init__(self, chunks: Sequence[Hope], layers: int, world: World) -> None:
        """Watches the blocks of this rank; `layers`: of the whole network."""
        self.seen = torch.zeros(layers, 2, dtype=torch.float64, device=world.device)  # sum of |u|^2, tokens
        for chunk in chunks:
            for layer, block in zip(chunk.stage.layers, chunk.blocks, strict=True):
                if type(block) is Block:
                    block.register_forward_hook(partial(self.watch, layer))

    def watch(self, layer: int, _: object, __: object, said: tuple[Tensor, object]) -> None:
        """Of a forward pass of a block, which gives (T, B, D) and a state."""
        if said[0].requires_grad:
            said[0].register_hook(partial(self.heard, layer))

    def heard(self, layer: int, u_TBD: Tensor) -> None:
        """Of a backward pass; a micro-batch that was refused (NaN) does not count."""
        square = u_TBD.detach().double().square().sum()
        news = torch.stack([square, torch.full_like(square, u_TBD.shape[0] * u_TBD.shape[1])])
        self.seen[layer] += torch.where(square.isfinite(), news, 0.0)

    def taken(self) -> dict[str, float]:
        """By layer, of the step that has ended. A collective.

        Tensor-parallel ranks that hold the same tokens count them alike, so a mean over all ranks is one over tokens.
        """
        dist.all_reduce(self.seen)
        found = {
            f"train/surprise/{layer}": (square / tokens) ** 0.5
            for layer, (square, tokens) in enumerate(self.seen.tolist())
            if tokens
        }
        self.seen.zero_()
        return found
