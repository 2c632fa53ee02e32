"""Initial values, as a table over leaf names. They depend on the seed and the name alone: every layout starts equal."""

import hashlib
import math
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from nlscale.config.model import Model
from nlscale.config.transfer import deviation_factor
from nlscale.runtime.leaf import Leaf

# The first pattern that matches decides: a constant, or what the standard deviation of normal values is.
TABLE: tuple[tuple[str, str], ...] = (
    ("*norm.weight", "ones"),
    ("*.gains", "ones"),
    ("embed.weight", "normal"),
    ("head.weight", "normal"),
    ("blocks.*.mix.*gain.*", "ones"),
    ("blocks.*.mix.*convolution.*", "first"),
    ("blocks.*.mix.*rate.bias", "zeros"),
    ("blocks.*.mix.*keep.bias", "kept"),
    ("blocks.*.mix.*momentum.bias", "faint"),
    ("blocks.*.mix.memory.start", "zeros"),
    ("blocks.*.mix.memory.slow", "identity"),
    ("blocks.*.mix.*memory.*.up", "heads"),
    ("blocks.*.mix.*memory.*.down", "normal"),
    ("blocks.*.mix.memory.context_[kv]", "heads"),
    ("blocks.*.mix.memory.write_[kv]", "heads"),
    ("blocks.*.mix.memory.read_q", "heads"),
    ("blocks.*.mix.*persistent.[kv]", "normal"),
    ("blocks.*.mix.*out.weight", "residual"),
    ("blocks.*.continuum.*.down.weight", "residual"),
    ("blocks.*.mix.[qkv].weight", "normal"),
    ("blocks.*.mix.recall.[qkv].weight", "normal"),
    ("blocks.*.mix.attend.[qkv].weight", "normal"),
    ("blocks.*.mix.attention_[qkv].weight", "normal"),
    ("blocks.*.mix.input.weight", "normal"),
    ("blocks.*.mix.recall.weight", "normal"),
    ("blocks.*.mix.*gate.weight", "normal"),
    ("blocks.*.mix.*rate.weight", "normal"),
    ("blocks.*.mix.*keep.weight", "normal"),
    ("blocks.*.mix.*momentum.weight", "normal"),
    ("blocks.*.continuum.*.gate.weight", "normal"),
    ("blocks.*.continuum.*.up.weight", "normal"),
)
CONSTANTS = {"ones": 1.0, "zeros": 0.0, "faint": -4.0}  # sigmoid(-4) = 0.02
KEPT = 0.99  # what memories keep of themselves a token, but for those that are told
BLOCK = 64  # rows (along the sharded axis) drawn by one generator, so that a rank draws only what it holds


def kind(name: str) -> str:
    """The table's word for a leaf; raises KeyError for a name that no pattern matches."""
    for pattern, word in TABLE:
        if fnmatchcase(name, pattern):
            return word
    raise KeyError(f"no initial value for '{name}'")


@torch.no_grad()
def initialize(leaves: list[Leaf], model: Model, seed: int, tensor_rank: int) -> None:
    """Fills every leaf of this rank. Residual projections are scaled by 1/sqrt(2 layers) (Radford et al., 2019)."""
    deviation = {
        "normal": model.init_std,
        "residual": model.init_std / (2 * model.layers) ** 0.5,
        "heads": model.head_width**-0.5,
    }
    kept = model.self_modifying.keep if model.mixer == "self_modifying" else KEPT
    constants = {**CONSTANTS, "kept": math.log(kept / (1 - kept))}
    for leaf in leaves:
        word = kind(leaf.name)
        if word in constants:
            leaf.value.fill_(constants[word])
            continue
        if word == "first":
            leaf.value.zero_()[:, 0] = 1.0
            continue
        if word == "identity":  # of each head, one below the other
            rows, width = leaf.value.shape
            leaf.value.zero_().view(rows // width, width, width).diagonal(dim1=1, dim2=2).fill_(1.0)
            continue
        axis = leaf.shard or 0
        offset = tensor_rank * leaf.value.shape[axis] if leaf.shard is not None else 0
        spread = deviation[word] * deviation_factor(leaf.name, model)
        draw(leaf.value.movedim(axis, 0), offset, f"{seed}:{leaf.name}", spread)


def draw(out_RN: Tensor, offset: int, key: str, deviation: float) -> None:
    """Fills rows `offset ...` of a global normal matrix, block of rows by block of rows."""
    if out_RN.is_meta:  # a plan has shapes only
        return
    rows, rest = out_RN.shape[0], out_RN.shape[1:]
    for block in range(offset // BLOCK, -(-(offset + rows) // BLOCK)):
        digest = hashlib.sha256(f"{key}:{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.randn((BLOCK, *rest), generator=generator) * deviation
        first, last = max(offset, block * BLOCK), min(offset + rows, (block + 1) * BLOCK)
        out_RN[first - offset : last - offset].copy_(values[first - block * BLOCK : last - block * BLOCK])
