"""Memories that go on from row to row, in a checkpoint: rectangles of (rows of the run, heads or units, ...).

So any layout takes over what any other left: replicas and micro-batches cut the rows, tensor and context parallelism the
heads, pipeline stages the layers. Where levels learn inside rows, context parallelism cuts the rows instead.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from nlscale.config.errors import UserError
from nlscale.model.row_state import RowState, mapped
from nlscale.parallel.carried import Carried
from nlscale.train.pieces import Pieces, Stored

if TYPE_CHECKING:
    from nlscale.train.state import TrainState

PREFIX = "memories/"


def memories(state: "TrainState") -> dict[str, Pieces]:
    """What this rank holds of every memory, as it lies."""
    found: dict[str, Pieces] = {}
    for carried in state.carried:
        for place, held in enumerate(carried.open()):
            for name, part, mixes, whole in named(carried, held):
                shape, base, owner = layout(state, part, place, mixes, whole)
                known = found.setdefault(PREFIX + name, Pieces(shape, [], owner))
                known.rectangles.append((base, part))
    return found


def named(carried: Carried, held: RowState) -> Iterator[tuple[str, Tensor, bool, bool]]:
    """Every tensor of a state under its global name, whether it is a mixer's, and of a layer that has whole rows."""
    model, parts = carried.model, []
    layers = list(model.stage.layers)
    first = len(layers) - len(held.copies)
    for i, mixer in enumerate(held.mixers):
        turn, layer = divmod(i, len(layers))
        where = True, layer >= first
        mapped(
            lambda name, part, at=where: parts.append((name, part, *at)), f"blocks.{layers[layer]}.mix.{turn}", mixer
        )
    for layer, copy in zip(layers[first:], held.copies, strict=True):
        mapped(lambda name, part: parts.append((name, part, False, True)), f"blocks.{layer}.continuum", copy)
    yield from parts


def layout(
    state: "TrainState", part: Tensor, place: int, mixes: bool, whole: bool
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Shape of the whole, where this part of it begins, and whether this rank writes it.

    `place`: the micro-batch; `mixes`: a mixer's; `whole`: of a layer whose rows context-parallel ranks share out.
    """
    run, world = state.run, state.world
    count, rest = part.shape[1], part.shape[2:]
    by_heads = mixes and not whole and run.model.mixer not in ("linear", "delta")
    contexts = world.context.size() if by_heads else 1
    share = world.tensor_rank * contexts + (world.context_rank if by_heads else 0)
    shared = run.model.inner.shared and not mixes  # one memory of all rows
    begins = world.replica * (run.train.global_batch // world.replicas) + place * run.train.micro_batch
    begins += world.context_rank * part.shape[0] if whole else 0
    first, total = (0, 1) if shared else (begins, run.train.global_batch)
    apart = by_heads or (whole and not shared)  # context-parallel ranks hold parts of their own
    owner = (apart or world.context_rank == 0) and not (shared and world.replica)
    shape = (total, count * world.tensor.size() * contexts, *rest)
    return shape, (first, share * count, *(0 for _ in rest)), owner


def check_memories(pieces: dict[str, Pieces], there: dict[str, Stored]) -> None:
    """Raises UserError where a checkpoint's memories are not built like this run's."""
    for name, each in pieces.items():
        if not name.startswith(PREFIX):
            continue
        now, then = Stored(tuple(each.shape), each.rectangles[0][1].dtype), there.get(name)
        if then is not None and then != now and then.shape[1:] == now.shape[1:] and then.dtype == now.dtype:
            raise UserError(
                f"{name.removeprefix(PREFIX)}: the checkpoint holds the memories of {then.shape[0]} rows a step; "
                f"train.global_batch={then.shape[0]} would work, or another run.name"
            )
        if then != now:
            raise UserError(
                f"{name.removeprefix(PREFIX)}: the checkpoint holds {then or 'no such memory'}, this run's model has "
                f"{now}; the precision and the model that it was trained with would work, or another run.name"
            )
