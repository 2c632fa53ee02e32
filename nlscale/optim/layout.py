"""How leaves lie in the flat memory that is sharded over replicas.

A flat holds the leaves of one group that follow one rule. Rules that work element by element take them packed, cut
anywhere. Rules that work on matrices get slots, one a replica, of whole matrices: a matrix has one owner, which needs no
collective over replicas to see it whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil

from torch import Tensor

from nlscale.config.errors import require
from nlscale.config.model import Model
from nlscale.config.optim import MATRIX_RULES
from nlscale.config.transfer import rate_factor
from nlscale.optim.levels import decays
from nlscale.runtime.leaf import Leaf

SLACK = 2  # memory of slots over that of the matrices in them, at most, on many replicas
ALIGN = 2  # elements: DeepSpeed cuts a flat into parts of an even length


@dataclass(frozen=True)
class Kind:
    """What the leaves of a flat have in common."""

    rule: str
    decays: bool
    rate: float = 1.0  # factor on the level's rate (config/transfer.py)
    nested: bool = False  # a fast level's leaf that is reset to its slow copy (spec 2.4)


@dataclass(frozen=True)
class Flat:
    """Leaves and where each begins; `elements` is a multiple of replicas x alignment."""

    kind: Kind
    places: tuple[tuple[Leaf, int], ...]
    elements: int

    def fill(self, flat: Tensor, values: Sequence[Tensor]) -> None:
        """Copies one tensor a leaf, in the order of `places`, into `flat`."""
        for (_, start), value in zip(self.places, values, strict=True):
            flat[start : start + value.numel()].view(value.shape).copy_(value)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of `flat`, shaped like the leaves."""
        return [flat[i : i + leaf.value.numel()].view(leaf.value.shape) for leaf, i in self.places]

    def runs(self, first: int, last: int) -> Iterator[tuple[Leaf, int, slice]]:
        """What elements first ... last hold: leaf, first of its local elements (row-major), where in the part."""
        for leaf, start in self.places:
            low, high = max(start, first), min(start + leaf.value.numel(), last)
            if low < high:
                yield leaf, low - start, slice(low - first, high - first)


# Two axes, but no matrix that maps activations: rows of the vocabulary, and what is stacked a head.
STACKS = ("embed.*", "head.*", "*.mix.*memory.*", "*.persistent.*", "*.convolution.*", "*.gain.*")


def is_matrix(leaf: Leaf) -> bool:
    """Whether a matrix rule applies."""
    return leaf.value.ndim == 2 and not any(fnmatchcase(leaf.name, pattern) for pattern in STACKS)


def kind_of(leaf: Leaf, rule: str, nested: bool, model: Model) -> Kind:
    """The flat that a leaf belongs to; `nested`: its level has a slower one to be reset from."""
    rule = "adamw" if rule in MATRIX_RULES and not is_matrix(leaf) else rule
    return Kind(rule, decays(leaf.name), rate_factor(leaf.name, model), nested and ".continuum." in leaf.name)


def flats(
    leaves: Sequence[Leaf], rule: str, nested: bool, model: Model, replicas: int, align: int = ALIGN
) -> list[Flat]:
    """The flats of a group, in a fixed order; a replica's part is a multiple of `align` elements."""
    kinds: dict[Kind, list[Leaf]] = {}
    for leaf in sorted(leaves, key=lambda leaf: (leaf.twin, leaf.shard is None)):  # what counts in norms lies together
        kinds.setdefault(kind_of(leaf, rule, nested, model), []).append(leaf)
    ordered = sorted(kinds.items(), key=lambda item: (item[0].rule, not item[0].decays, item[0].rate, item[0].nested))
    return [(slots if kind.rule in MATRIX_RULES else packed)(kind, held, replicas, align) for kind, held in ordered]


def packed(kind: Kind, leaves: Sequence[Leaf], replicas: int, align: int) -> Flat:
    """Leaves one after another; the rest is padding."""
    places, start = [], 0
    for leaf in leaves:
        places.append((leaf, start))
        start += leaf.value.numel()
    return Flat(kind, tuple(places), ceil(start / (replicas * align)) * replicas * align)


def slots(kind: Kind, leaves: Sequence[Leaf], replicas: int, align: int) -> Flat:
    """The largest matrix first, each to the slot that holds least: loads differ by one matrix at most."""
    held: list[list[Leaf]] = [[] for _ in range(replicas)]
    sizes = [0] * replicas
    for leaf in sorted(leaves, key=lambda leaf: -leaf.value.numel()):
        slot = sizes.index(min(sizes))
        held[slot].append(leaf)
        sizes[slot] += leaf.value.numel()
    size, real = ceil(max(sizes) / align) * align, sum(sizes)
    require(
        size * replicas <= SLACK * real + align * replicas or replicas <= 8,
        f"{kind.rule}: {len(leaves)} matrices cannot be shared out evenly over {replicas} replicas "
        f"({size * replicas / real:.1f} x their memory); use fewer replicas (more tensor or pipeline parallel), "
        "fewer levels, or adamw for this level",
    )
    places = []
    for slot, members in enumerate(held):
        start = slot * size
        for leaf in members:
            places.append((leaf, start))
            start += leaf.value.numel()
    return Flat(kind, tuple(places), size * replicas)


def buckets(leaves: Sequence[Leaf], limit: int, rule: str) -> list[list[Leaf]]:
    """Leaves cut into runs of whole blocks of at most `limit` elements, in the order of the forward pass.

    Matrices under a rule that needs them whole stay together: the more of them, the evener their owners' loads.
    """
    whole = [leaf for leaf in leaves if rule in MATRIX_RULES and is_matrix(leaf)]
    kept = set(whole)
    runs: list[list[Leaf]] = [whole] if whole else []
    return runs + cut([leaf for leaf in leaves if leaf not in kept], limit)


def cut(leaves: Sequence[Leaf], limit: int) -> list[list[Leaf]]:
    """Leaves in runs of whole blocks of at most `limit` elements."""
    runs: list[list[Leaf]] = []
    sizes: dict[str, int] = {}
    for leaf in leaves:
        sizes[block_of(leaf)] = sizes.get(block_of(leaf), 0) + leaf.value.numel()
    filled, last = 0, ""
    for leaf in leaves:
        block = block_of(leaf)
        if block != last:
            if not runs or filled + sizes[block] > limit:
                runs.append([])
                filled = 0
            filled, last = filled + sizes[block], block
        runs[-1].append(leaf)
    return runs


def block_of(leaf: Leaf) -> str:
    """The block of a leaf; the embedding and the head are blocks of their own."""
    parts = leaf.name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
