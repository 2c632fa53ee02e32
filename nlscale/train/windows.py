"""Open windows in a checkpoint: any layout and any policy of reduction takes over what any other left (spec 3.12).

A window's total is stored as parts that only add up: one a replica (`reduce: defer`), a node (`hierarchical`), or one
(`eager`). A part of a leaf whose gradients are partial over ranks is stored a rank. On another layout parts are dealt
out; whoever takes a part adds it to its own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.optim.partial import sum_over
from nlscale.optim.reduce import Open
from nlscale.optim.shard import Fragment
from nlscale.runtime.leaf import Leaf
from nlscale.train.pieces import Pieces, load, rectangles

if TYPE_CHECKING:
    from nlscale.train.state import TrainState

PARTIAL = ("norm.weight", "gains", "embed.weight")  # leaves whose gradients some layouts leave partial


def window_name(leaf: str, part: int, share: int) -> str:
    """Key of one part of a leaf's open window; `share` tells partial sums apart."""
    return f"windows/{part}/{share}/{leaf}"


def dealt(stored: int, rank: int, ranks: int) -> range:
    """Which of `stored` parts fall to `rank` of `ranks`: sums may be dealt out freely, only their total counts."""
    return range(rank, stored, ranks)


def share_of(leaf: Leaf, policy: Open, state: "TrainState") -> tuple[int, int]:
    """(which, of how many) partial sums of a leaf this rank holds under a policy."""
    if policy.partial and leaf.partial:
        return state.world.tensor_rank, state.world.tensor.size()
    if policy.partial and leaf.tied:
        return int(leaf.twin), 2
    return 0, 1


def windows_to_save(state: "TrainState") -> dict[str, Pieces]:
    """Open windows as they lie, or their total (`checkpoint.windows`). A collective in the latter case."""
    found: dict[str, tuple[Leaf, list, bool]] = {}
    for policy in state.open_sums():
        for fragment in policy.open():
            leaf, values = fragment.leaf, fragment.values["window"]
            part, (share, shares) = policy.part, share_of(leaf, policy, state)
            owner = state.owns(leaf) or shares > 1
            if state.run.checkpoint.windows == "total" and policy.partial:
                values, part, share = totalled(leaf, values, state), 0, 0
                owner = state.owns(leaf) and state.world.copy == 0
            parts = found.setdefault(window_name(leaf.name, part, share), (leaf, [], owner))[1]
            parts += rectangles(values, fragment.start, leaf.value.shape, leaf.base(state.world.tensor_rank))
    ranks = state.world.tensor.size()
    return {key: Pieces(leaf.shape(ranks), parts, owner) for key, (leaf, parts, owner) in found.items()}


def totalled(leaf: Leaf, window: Tensor, state: "TrainState") -> Tensor:
    """The sum of a leaf's windows over replicas and partial shares."""
    total = window.clone()
    sum_over([total], state.world.data)
    if leaf.partial:
        sum_over([total], state.world.tensor)
    if leaf.tied:
        sum_over([total], state.world.ends)
    return total


def window_facts(state: "TrainState") -> dict[str, Any]:
    """How many parts and shares are saved, and the tokens of each replica. A collective over replicas."""
    windows, world, parallel = state.optimizer.windows, state.world, state.run.parallel
    counts = [torch.zeros_like(windows.tokens) for _ in range(world.copies)]
    dist.all_gather(counts, windows.tokens, group=world.data)
    policy = next(p for mover in state.optimizer.movers.values() for p in mover.policies)
    apart = policy.partial and state.run.checkpoint.windows == "each"
    ranks = world.tensor.size() if apart else 1
    each = state.run.checkpoint.windows == "each"
    ends = 2 if apart and state.run.model.tied and parallel.pipeline > 1 else 1
    return {
        "parts": policy.parts if apart or not policy.partial else 1,
        "gram_parts": world.copies if each else 1,
        "gram_shares": world.tensor.size() if each and parallel.sequence else 1,
        "shares": dict(zip(PARTIAL, (ranks if parallel.sequence else 1, ranks, ends), strict=True)),
        "tokens": [dict(zip(windows.groups, count.tolist(), strict=True)) for count in counts],
        "open": windows.open,
    }


def wanted(state: "TrainState", stored: dict[str, Any]) -> Iterator[tuple[Fragment, list[str]]]:
    """Every fragment of an open window that this rank holds, and the stored parts that it adds up."""
    for policy in state.open_sums():
        for fragment in policy.open():
            name = fragment.leaf.name
            gram, shares = name.endswith(".gram"), stored["shares"]
            then = stored["gram_shares"] if gram else next((n for end, n in shares.items() if name.endswith(end)), 1)
            inputs = gram or name.endswith(".gram_cut")
            parts = dealt(stored["gram_parts"] if inputs else stored["parts"], policy.part, policy.parts)
            mine = dealt(then, *share_of(fragment.leaf, policy, state))
            yield fragment, [window_name(name, part, share) for part in parts for share in mine]


def load_windows(state: "TrainState", stored: dict[str, Any], path: Path) -> None:
    """Deals the saved windows out to this layout; the same layout gets each rank's own bits back. A collective."""
    held = list(wanted(state, stored))
    for fragment, _ in held:
        fragment.values["window"].zero_()
    rounds = torch.tensor(max((len(names) for _, names in held), default=0), device=state.world.device)
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
    for turn in range(int(rounds)):  # a load is a collective: every rank takes the same number of turns
        buffers = [(f, names[turn], torch.empty_like(f.values["window"])) for f, names in held if turn < len(names)]
        load(pieces_of(buffers, state), path)
        for fragment, _, values in buffers:
            fragment.values["window"].add_(values)


def pieces_of(buffers: Sequence[tuple[Fragment, str, Tensor]], state: "TrainState") -> dict[str, Pieces]:
    """Buffers that lie like fragments, as pieces to be read."""
    found: dict[str, tuple[Leaf, list]] = {}
    for fragment, name, values in buffers:
        parts = found.setdefault(name, (fragment.leaf, []))[1]
        parts += rectangles(
            values, fragment.start, fragment.leaf.value.shape, fragment.leaf.base(state.world.tensor_rank)
        )
    ranks = state.world.tensor.size()
    return {name: Pieces(leaf.shape(ranks), parts, False) for name, (leaf, parts) in found.items()}
