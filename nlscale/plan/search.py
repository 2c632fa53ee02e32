"""Layouts of a run on so many GPUs: every one that the arithmetic allows, ranked by what its step would take."""

import itertools
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from nlscale.config.devices import ROOM, Device
from nlscale.config.errors import UserError, divisors
from nlscale.config.parallel import Parallel
from nlscale.config.run import Run
from nlscale.plan.estimate import Estimate, Times
from nlscale.plan.holding import Counted, count

MICRO = (1, 2, 4, 8, 16)
Reduce = Literal["defer", "eager", "hierarchical"]  # as tried: the simpler of two that are equal comes first
RECOMPUTE: tuple[Literal["none", "block"], ...] = ("none", "block")
CONTEXT = (1, 2, 4, 8)
TIES = 0.02  # steps that differ by less are equal: then the layout that cuts the model less comes first, ...
EASY = 0.6  # ... then, within this share of the memory, the one with more rows in a product
# bytes a parameter, over all GPUs, below which nothing fits: weights and windows; all else may be on the host
LEAST = 6


@dataclass(frozen=True)
class Choice:
    """One layout, and what it would take."""

    run: Run
    gpus: int
    resident: float  # bytes, of the stage that holds most
    host: float  # bytes in host memory, of the stage that holds most there
    times: Times
    mfu: float

    @property
    def cuts(self) -> int:
        """Pieces of the model."""
        return self.run.parallel.ranks * self.run.parallel.virtual_pipeline

    def share(self, device: Device) -> float:
        """Of the memory that can be used, on the GPU or beside it, whichever is nearer to its end."""
        return max(self.resident / (ROOM * device.memory), self.host / device.host_room)

    def fits(self, device: Device) -> bool:
        """Whether the memory of every GPU is enough, and that beside it."""
        return self.share(device) <= 1

    def differences(self, beside: Run | None = None) -> dict[str, str]:
        """What makes the layout: key -> value, where it is not what `beside` says (unset: the defaults)."""
        mine, others = settings(self.run), settings(beside) if beside else DEFAULTS
        found = {key: value for key, value in mine.items() if value != others.get(key)}
        return {key: str(value).lower() for key, value in found.items()}

    def why(self) -> str:
        """Where the step's time goes beside products, the larger parts."""
        parts = {name: seconds / self.times.step for name, seconds in vars(self.times).items() if name != "products"}
        large = sorted(((share, name) for name, share in parts.items() if share >= 0.02), reverse=True)
        return ", ".join(f"{name} {share:.0%}" for share, name in large) or "products alone"


def settings(run: Run) -> dict[str, Any]:
    """What of a run is its layout."""
    named: dict[str, Any] = {"train.micro_batch": run.train.micro_batch, "train.recompute": run.train.recompute}
    named |= {"optim.reduce": run.optim.reduce, "optim.offload": run.optim.offload}
    return {f"parallel.{name}": value for name, value in vars(run.parallel).items()} | named


DEFAULTS = {f"parallel.{name}": value for name, value in vars(Parallel()).items()}
DEFAULTS |= {"train.recompute": "none", "optim.reduce": "defer", "optim.offload": 0}


def ranked(run: Run, gpus: int, device: Device, rows: Sequence[int] = MICRO) -> list[Choice]:
    """Layouts that fit, the fastest first; where none fits, those that miss by least. Empty: the arithmetic allows none.

    `rows`: micro-batches that are tried.
    """
    slow = sorted(level.steps for level in run.levels if level.steps >= 16)
    choices = list(weighed(run, gpus, device, rows, (0, *slow[:1])))
    if not any(each.fits(device) for each in choices):
        choices += weighed(run, gpus, device, rows, (1,))  # slower than anything else, and better than nothing
    fitting = [each for each in choices if each.fits(device)]
    if not fitting:
        return sorted(choices, key=lambda each: each.share(device))
    least = min(each.times.step for each in fitting)

    def order(each: Choice) -> tuple[int, int, bool, int]:
        slower, tight = int((each.times.step / least - 1) / TIES), each.resident > EASY * device.memory
        return slower, each.cuts, tight, -each.run.train.micro_batch

    return sorted(fitting, key=order)


def weighed(run: Run, gpus: int, device: Device, rows: Sequence[int], offloads: Sequence[int]) -> Iterator[Choice]:
    """Every layout; of one that does not fit, also the ways to save memory."""
    counted = count(run)
    for parallel, micro in candidates(run, gpus, device, rows):
        each_way = variants(run, parallel, micro, offloads)
        first = assessed(next(each_way), gpus, device, counted)
        if first is None:
            continue
        yield first
        if not first.fits(device):
            yield from (each for each in (assessed(way, gpus, device, counted) for way in each_way) if each)


def accepted(run: Run, gpus: int, device: Device, rows: Sequence[int] = MICRO) -> Iterator[Choice]:
    """Those of them which the config accepts as a whole, in order: of each layout, the first way to save memory."""
    seen = set[tuple[Parallel, int]]()
    for choice in ranked(run, gpus, device, rows):
        layout = choice.run.parallel, choice.run.train.micro_batch
        if layout in seen:
            continue
        try:
            whole = replace(choice.run)
        except UserError:
            continue
        seen.add(layout)
        yield replace(choice, run=whole)


def assessed(run: Run, gpus: int, device: Device, counted: Counted | None = None) -> Choice | None:
    """A layout's figures; None where it does not fit the ranks."""
    try:
        estimate = Estimate(run, gpus, counted)
    except UserError:
        return None
    if run.optim.reduce == "hierarchical" and estimate.replicas % estimate.node:
        return None
    times = estimate.times(device)
    return Choice(run, gpus, estimate.largest, estimate.beside, times, estimate.mfu(device, times))


def candidates(run: Run, gpus: int, device: Device, tried: Sequence[int]) -> Iterator[tuple[Parallel, int]]:
    """Every layout whose numbers divide, and rows of a micro-batch."""
    model, train = run.model, run.train
    heads = [model.heads] + ([model.key_value_heads] if model.mixer == "attention" else [])
    for tensor, context, pipeline in itertools.product(divisors(device.node), CONTEXT, divisors(model.layers)):
        inner = tensor * context
        trading = tensor if model.mixer in ("linear", "delta") else inner
        if gpus % (inner * pipeline) or any(count % trading for count in heads):
            continue
        rows = train.global_batch * inner * pipeline // gpus
        for micro in (each for each in tried if rows and rows % each == 0):
            for virtual in (1, 2, 4) if pipeline > 1 else (1,):
                if model.layers % (pipeline * virtual) or (virtual > 1 and (rows // micro) % pipeline):
                    continue
                parallel = Parallel(
                    tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context, sequence=tensor > 1
                )
                yield parallel, micro


def variants(run: Run, parallel: Parallel, micro: int, offloads: Sequence[int]) -> Iterator[Run]:
    """A layout as runs that nobody has checked yet; each but the first may save memory, at the price of time."""
    for recompute, offload, reduce in itertools.product(RECOMPUTE, offloads, get_args(Reduce)):
        made = copy(run)  # checked as a whole where it is reported: the check takes longer than the estimate
        optim = replace(run.optim, reduce=reduce, offload=offload)
        train = replace(run.train, micro_batch=micro, recompute=recompute)
        for name, value in (("parallel", parallel), ("train", train), ("optim", optim)):
            object.__setattr__(made, name, value)
        yield made
