"""Kernels of optimizers against torch's own: one pass over flat memory, and orthogonalisation."""

from collections.abc import Callable, Sequence

import torch
from nlscale_kernels import level_step, newton_schulz
from nlscale_kernels.newton_schulz import reference
from torch import Tensor

from nlscale.bench import peers
from nlscale.bench.table import Row, Timer, at_least, beside, by_compiler

PERIODS = (1, 4, 16, 64)
HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ITERATIONS, EPS = 5, 1e-7  # of Newton-Schulz
COPYING = 0.9  # share of a copy's bytes a second


def levels(elements: int, device: str, timer: Timer) -> list[Row]:
    """level_step on a shard of a bfloat16 model: bytes a second of those of a copy; against torch's two optimizers."""
    master = torch.randn(elements, device=device)
    gradient, copy = torch.randn_like(master), master.bfloat16()
    narrow = gradient.bfloat16()
    first, second = torch.zeros_like(master), torch.zeros_like(master)
    rows = level_step.table([level_step.AdamW.at(1, 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5)], master)

    def fused() -> None:
        level_step.adamw(master, gradient, first, second, copy, rows)

    def fused_narrow() -> None:
        level_step.adamw(master, narrow, first, second, copy, rows)

    def theirs(**how: bool) -> Callable[[], None]:
        parameter = torch.nn.Parameter(torch.randn(elements, device=device))
        optimizer = torch.optim.AdamW([parameter], **HYPER, **how)  # type: ignore[arg-type]

        def step() -> None:
            parameter.grad = gradient.mul_(0.5)
            optimizer.step()
            copy.copy_(parameter.detach())

        return step

    def written_out() -> None:
        scaled = gradient * 0.5
        first.lerp_(scaled, 0.1)
        second.mul_(0.95).addcmul_(scaled, scaled, value=0.05)
        master.mul_(1 - 1e-4).addcdiv_(first, second.sqrt().add_(1e-8), value=-1e-3)
        copy.copy_(master)

    compiled = by_compiler(written_out, device)
    resting = level_step.table([level_step.AdamW.at(1, 1e-3, (0.9, 0.95), 1e-8, 0.1), level_step.AdamW.rest()], master)
    quarter = (torch.arange(-(-elements // level_step.BLOCK), device=device) % 4 > 0).int()

    def one_of_four() -> None:
        level_step.adamw(master, gradient, first, second, copy, resting, quarter)

    source, target = torch.empty_like(master), torch.empty_like(master)
    others = [theirs(foreach=True), theirs(fused=True), compiled]
    runs = [fused, fused_narrow, *others, one_of_four, lambda: target.copy_(source)]
    own, own_narrow, foreach, fused_torch, fast, one, copied, *peer = timer(
        [*runs, *peers.fused_adam(copy.clone(), narrow, HYPER)]
    )
    copying = 8 * elements / copied
    rates = {"float32 gradients": 30 * elements / own, "bfloat16 gradients": 28 * elements / own_narrow}
    return [
        *(
            at_least(f"level_step, {name}, bytes a second / a copy's", rate / 1e12, "TB/s", copying / 1e12, COPYING)
            for name, rate in rates.items()
        ),
        at_least("level_step, foreach AdamW, scale, cast / own", foreach, "s", own, 3.0),
        at_least("level_step, fused AdamW, scale, cast / own", fused_torch, "s", own, 1.35),
        at_least("level_step, written out and compiled by torch.compile / own", fast, "s", own, 0.97),
        at_least("level_step, all levels / one of four due", own, "s", one, 3.0),
        *(at_least("level_step, TransformerEngine's FusedAdam / own", each, "s", own_narrow, 1.0) for each in peer),
    ]


def continuum(elements: int, device: str, timer: Timer) -> list[Row]:
    """Four levels of equal size that move every 1, 4, 16 and 64 steps: the mean step of one launch, whose table says which
    are due, and of torch's foreach optimizers of those that are.
    """
    share = elements // len(PERIODS)
    parameters = [torch.nn.Parameter(torch.randn(share, device=device)) for _ in PERIODS]
    copies = [each.detach().bfloat16() for each in parameters]
    optimizers = [torch.optim.AdamW([each], **HYPER, foreach=True) for each in parameters]  # type: ignore[arg-type]
    master = torch.randn(len(PERIODS) * share, device=device)
    state = [torch.randn_like(master), torch.zeros_like(master), torch.zeros_like(master), master.bfloat16()]
    rows = level_step.table(
        [level_step.AdamW.at(1, 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5), level_step.AdamW.rest()], master
    )
    place = torch.arange(-(-len(master) // level_step.BLOCK), device=device) * level_step.BLOCK // share

    def theirs(due: int) -> Callable[[], None]:
        def step() -> None:
            for parameter, copy, optimizer in zip(parameters[:due], copies[:due], optimizers[:due], strict=True):
                parameter.grad = copy.float().mul_(0.5)
                optimizer.step()
                copy.copy_(parameter.detach())

        return step

    def ours(due: int) -> Callable[[], object]:
        blocks = (place >= due).int()
        return lambda: level_step.adamw(master, *state, rows, blocks)

    counts = range(1, len(PERIODS) + 1)
    times = timer([form(due) for form in (ours, theirs) for due in counts])
    own, foreach = (mean_step(times[start : start + len(PERIODS)]) for start in (0, len(PERIODS)))
    periods = "/".join(map(str, PERIODS))
    return [at_least(f"level_step, levels of {periods} steps, foreach AdamW / own, mean", foreach, "s", own, 2.2)]


def mean_step(seconds: Sequence[float]) -> float:
    """Of steps in which the first 1, 2, ... levels are due."""
    last = PERIODS[-1]
    due = [sum(step % period == 0 for period in PERIODS) for step in range(1, last + 1)]
    return sum(seconds[count - 1] for count in due) / last


def matrices(elements: int, device: str, timer: Timer) -> list[Row]:
    """What Muon and M3 do to flat memory around the orthogonalisation: bytes a second of those of a copy; gradients and
    directions in bfloat16.
    """
    master, momentum = torch.randn(2, elements, device=device).unbind(0)
    total, slow = torch.zeros_like(master), torch.zeros_like(master)
    gradient, copy = master.bfloat16(), master.bfloat16()
    muon = level_step.table([level_step.Momenta(1.0, 0.5, 0.95, 1.0)], momentum)
    gathers, moves = (
        level_step.table([level_step.Momenta(1.0, 0.5, 1.0, 0.1, fires, 1.0, 0.1)], momentum) for fires in (0.0, 1.0)
    )
    descend = level_step.table([level_step.Descend(1.0, 1e-3, 0.1)], master)
    source, target = torch.empty_like(master), torch.empty_like(master)
    forms = {  # bytes an element, and what moves them
        "momentum": (10, lambda: level_step.momenta(gradient, momentum, None, None, muon)),
        "momenta of M3, slow one at rest": (18, lambda: level_step.momenta(gradient, momentum, total, slow, gathers)),
        "momenta of M3": (26, lambda: level_step.momenta(gradient, momentum, total, slow, moves)),
        "step along a direction": (12, lambda: level_step.descend(master, gradient, copy, descend)),
    }
    copied, *took = timer([lambda: target.copy_(source), *(run for _, run in forms.values())])
    copying = 8 * elements / copied / 1e12
    return [
        at_least(
            f"level_step, {name}, bytes a second / a copy's", moved * elements / own / 1e12, "TB/s", copying, COPYING
        )
        for (name, (moved, _)), own in zip(forms.items(), took, strict=True)
    ]


def symmetric(side: int, device: str, timer: Timer, fastest: float) -> list[Row]:
    """X X^T against plain products; `fastest`: multiplications a second of one large product."""
    square = numbers(side, side, device)
    compiled = by_compiler(plain_product, device)
    own, plain, fast, *peer = timer(
        [
            lambda: newton_schulz.symmetric_product(square, square),
            lambda: plain_product(square),
            lambda: compiled(square),
            *peers.symmetric(square),
        ]
    )
    done = side**3 / 2
    return [
        at_least(f"X X^T {side}, torch / own", plain, "s", own, 1.5),
        at_least(f"X X^T {side}, torch.compile / own", fast, "s", own, 1.5),
        beside(f"X X^T {side}, share of a product's rate", done / own / 1e12, "T/s", fastest / 1e12),
        *(at_least(f"X X^T {side}, quack / own", each, "s", own, 0.85) for each in peer),
    ]


def orthogonalisation(side: int, aspect: int, device: str, timer: Timer, fastest: float) -> list[Row]:
    """Newton-Schulz of a matrix `aspect` times as wide as high, in the form that has fewer multiplications.

    Against a library that divides by the norm itself, ours does so too.
    """
    x, wanted = numbers(side, aspect * side, device), 1.7 if aspect > 1 else 1.25

    def own(x_KNM: Tensor = x) -> Tensor:
        return newton_schulz.orthogonal(x_KNM, ITERATIONS)

    def own_of_norm_one() -> Tensor:
        return own(x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS))

    def plain() -> Tensor:
        return reference.direct(x, ITERATIONS)

    forms = [own, own_of_norm_one, plain, by_compiler(plain, device), *peers.orthogonal(x, ITERATIONS)]
    took, took_whole, dense, fast, *peer = timer(forms)
    done = min(reference.multiplications(side, aspect * side, ITERATIONS))
    name = f"Newton-Schulz {side} x {aspect * side}"
    return [
        at_least(f"{name}, torch / own", dense, "s", took, wanted),
        at_least(f"{name}, torch.compile / own", fast, "s", took, wanted),
        beside(f"{name}, share of a product's rate", done / took / 1e12, "T/s", fastest / 1e12),
        *(at_least(f"{name}, gram-newton-schulz / own", each, "s", took_whole, 0.85) for each in peer),
    ]


def numbers(rows: int, columns: int, device: str) -> Tensor:
    """(1, rows, columns) in bfloat16, which is what the kernel takes; in float32 where there is none."""
    made = torch.randn(1, rows, columns, device=device) / rows
    return made.bfloat16() if device == "cuda" else made


def plain_product(x: Tensor) -> Tensor:
    """x x^T."""
    return x @ x.mT
