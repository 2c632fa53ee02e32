"""A row read in parts of any length, as where tokens are made one by one, is the row read at once (spec B32)."""

import pytest
import torch
from torch import Tensor

from nlscale.config.run import Run
from nlscale.model.hope import Hope
from nlscale.testing import ranks
from tests.model.test_mixing import CASES, CHUNKS, built
from tests.tiny import tiny

PARTS = ([1] * 16, [3, 1, 5, 2, 5], [7, 9], [4, 1, 11], [13, 3])  # tokens; chunks are of 4, and 2 in chunks of 4
WIDER = [*CHUNKS, "model.self_modifying.maker_chunk=8"]
MORE = {
    "self_modifying-recompute": ["model.mixer=self_modifying", "model.self_modifying.recompute=true"],
    "self_modifying-main-alone": ["model.mixer=self_modifying", "model.self_modifying.written=[main]"],
    "self_modifying-makers-alone": ["model.mixer=self_modifying", "model.self_modifying.written=[key,rate]"],
}


def row() -> tuple[Tensor, list[Tensor]]:
    """Tokens, and starts of rows of one document and of several."""
    tokens = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    nowhere = torch.zeros_like(tokens, dtype=torch.bool)
    begins = nowhere.clone()
    begins[0, [0, 6, 7]] = begins[1, 9] = True
    return tokens, [nowhere, begins]


def walked(model: Hope, x: Tensor, starts: Tensor, parts: list[int]) -> Tensor:
    """States (T, B, D) after the last block, of a row that comes in parts."""
    said, left, past = [], None, 0
    for count in parts:
        place = model.scene(starts[:, : past + count], past=past, hand_on=True)
        part, left = model.walk(x[past : past + count], place, left)
        said.append(part)
        past += count
    return torch.cat(said)


def differences(run: Run) -> dict[str, float]:
    """Largest differences of states, and of gradients in units of the largest, by the parts that a row comes in."""
    model, leaves = built(run)
    tokens, several = row()
    weights = [leaf.parameter for leaf in leaves if leaf.name.startswith("blocks.")]
    found: dict[str, float] = {}
    for what, starts in zip(("one document", "several"), several, strict=True):
        slopes = []
        for parts in ([16], *PARTS):
            x = model.enter(tokens).detach()
            states = walked(model, x, starts, parts)
            share = torch.linspace(0.5, 1.5, states.numel(), dtype=states.dtype).view_as(states)
            each = torch.autograd.grad((states.square() * share).sum(), weights, allow_unused=True)
            slopes.append([states.detach(), *(slope for slope in each if slope is not None)])
        whole = slopes[0]
        for parts, other in zip(PARTS, slopes[1:], strict=True):
            apart = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(whole, other, strict=True)]
            found[f"{what}, {parts}"] = max(apart)
    return found


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_a_row_in_parts_of_any_length_is_the_row_at_once(case: str) -> None:
    """And so are its gradients, through what the parts hand on."""
    (found,) = ranks(1, differences, tiny(*WIDER, *(CASES | MORE)[case]))
    assert len(found) == 2 * len(PARTS)
    assert max(found.values()) < 1e-11, found
