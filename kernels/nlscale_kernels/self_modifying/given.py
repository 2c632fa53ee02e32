"""What the main memory's walk is given and gives as an operator, and what it says of arguments that do not fit.

B rows, H heads, T tokens, N chunks that write (the first ones), C tokens of a chunk, K head width, M units.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nlscale_kernels.arguments import alike, check, described

WIDEST = 64  # head width and units: both matrices and what a chunk adds to them must fit in a processor's registers
ROOM = (9, 10)  # compute capabilities (major) whose registers and shared memory hold it


class Given(NamedTuple):
    """What the operator is given, all of one dtype."""

    q: Tensor  # (B, H, T, K), as the two after it
    k: Tensor
    v: Tensor
    rate: Tensor  # (B, H, T)
    reach: Tensor  # (B, H, N C, K)
    write: Tensor  # (B, H, N C)
    hold: Tensor | None  # the same; None: no momentum
    turn: Tensor  # (B, H, N, K, K)
    factors: Tensor  # (B, H, N, 4): whole, how much of W2's momentum goes on; carry and left of W1's
    fresh: Tensor | None  # (B, T): the token's anchor is the initial state; None: no document begins
    up: Tensor  # (B, H, M, K)
    down: Tensor  # (B, H, K, M)
    up_speed: Tensor | None
    down_speed: Tensor | None
    first_up: Tensor  # (H, M, K), the initial state
    first_down: Tensor  # (H, K, M)
    chunk: int
    clip: float


DIFFERENTIABLE = tuple(name for name in Given._fields if name not in ("fresh", "chunk", "clip"))


class Walked(NamedTuple):
    """What it gives; the momentum is empty where there is none."""

    said: Tensor  # (B, H, T, K)
    up: Tensor
    down: Tensor
    up_speed: Tensor
    down_speed: Tensor
    kept: Tensor  # what the kernels' backward wants of forward; empty without them; no gradient goes through it


def check_given(given: Given) -> None:
    """Raises ValueError for arguments that do not fit each other, by name."""
    (B, H, T, K), N, M = given.q.shape, given.turn.shape[2], given.up.shape[2]
    written, kept, speed = N * given.chunk, given.turn.shape[:3], given.hold is not None
    check(
        0 < written <= T and T % given.chunk == 0,
        f"resident: turn is of {N} chunks of {given.chunk} tokens; there are {T} tokens, which must be whole chunks",
    )
    wanted = {
        **dict.fromkeys(("q", "k", "v"), (B, H, T, K)),
        **{"rate": (B, H, T), "reach": (B, H, written, K), "write": (B, H, written), "turn": (B, H, N, K, K)},
        **{"hold": (B, H, written) if speed else None, "factors": (*kept, 4)},
        **{"up": (B, H, M, K), "down": (B, H, K, M), "first_up": (H, M, K), "first_down": (H, K, M)},
        **{"up_speed": (B, H, M, K) if speed else None, "down_speed": (B, H, K, M) if speed else None},
    }
    for name, shape in wanted.items():
        tensor = getattr(given, name)
        fits_in = (tensor is None) == (shape is None)
        if tensor is not None and shape is not None:
            fits_in = alike(tensor, shape, given.q)
        check(
            fits_in,
            f"resident: {name} is {described(tensor)}; it must be "
            f"{None if shape is None else f'{given.q.dtype} {shape} on {given.q.device}'}",
        )
    check(
        given.fresh is None
        or (given.fresh.shape == (B, T) and given.fresh.dtype == torch.bool and given.fresh.device == given.q.device),
        f"resident: fresh is {described(given.fresh)}; it must be {torch.bool} {(B, T)} on {given.q.device}",
    )


def check_on_gpu(q: Tensor, up: Tensor) -> None:
    """Raises ValueError for what the kernels cannot take; `walk` asks before."""
    check(q.dtype == torch.float32, f"resident: q is {q.dtype}; on a GPU it takes torch.float32")
    check(
        max(up.shape[-2:]) <= WIDEST,
        f"resident: up is {tuple(up.shape[-2:])}; heads and units of at most {WIDEST} stay on chip, "
        "the walk chunk by chunk takes any",
    )
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else ROOM[0]
    check(
        major in ROOM,
        f"resident: {q.device} is of sm_{major}0; sm_90 and sm_100 have room, the walk chunk by chunk needs none",
    )
