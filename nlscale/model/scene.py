"""What a block may know of the row that it works on, beside its activations."""

from typing import NamedTuple

import torch
from torch import Tensor

from nlscale.model.block_mask import Mask, block_mask, takes

Rotary = tuple[Tensor, Tensor]


class Scene(NamedTuple):
    """Facts of the whole row, T tokens, whatever part of it a rank holds."""

    table: Rotary  # cosines and sines of positions from 0 on, (past + T, 1, 1, K) each
    rotary: Rotary  # of the queries' own positions, (T, 1, 1, K) each
    mask: Mask  # which keys attention sees
    window: int | None  # tokens that attention sees at most, so that earlier ones need no key; None: all
    starts_BT: Tensor | None  # true at a document's first token; None: no document is apart
    hand_on: bool = False  # whether anybody wants the states that the mixers leave


def scene(
    rotary: Rotary,
    starts_BT: Tensor | None,
    window: int | None,
    past: int = 0,
    hand_on: bool = False,
    attends: bool = True,
    blocks: bool = True,
) -> Scene:
    """The scene of the tokens after the first `past` of `starts`' row (None: rows are one document each).

    A token attends to itself and earlier tokens of its document, `window` of them at most (None: all). Keys are those of
    the tokens that one of these may attend to. `attends`: whether anybody asks for the mask; `blocks`: whether
    who does can take it by blocks.
    """
    masked = attends and (starts_BT is not None or window is not None or past > 0)
    tokens, device = rotary[0].shape[0], rotary[0].device
    mask: Mask = None
    if masked and blocks and takes(rotary[0], past):
        mask = block_mask(tokens, starts_BT, window, device)
    elif masked:
        mask = allowed(tokens, starts_BT, window, past, device)
    here = None if starts_BT is None else starts_BT[:, past:]
    return Scene(rotary, (rotary[0][past:], rotary[1][past:]), mask, window, here, hand_on)


def allowed(tokens: int, starts_BT: Tensor | None, window: int | None, past: int, device: torch.device) -> Tensor:
    """Which keys each of the tokens after `past` may attend to, (B or 1, 1, queries, keys)."""
    place = torch.arange(tokens, device=device)
    first = 0 if window is None else max(0, past + 1 - window)
    queries, keys = place[past:, None], place[first:]
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    if starts_BT is None:
        return mask[None, None]
    document_BT = starts_BT.cumsum(1, dtype=torch.int32)
    return (mask & (document_BT[:, past:, None] == document_BT[:, None, first:]))[:, None]
