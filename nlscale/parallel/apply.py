"""Run -> the chunks of the model on this rank, and the one function that runs forward and backward on them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.summed_loss import whole_loss
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint

from nlscale.config.levels import Levels, learning
from nlscale.config.run import Run
from nlscale.model.exchange import Exchange
from nlscale.model.hope import Block, Hope, Stage
from nlscale.model.in_sequence import HopeInSequence, Rhythm
from nlscale.model.init import initialize
from nlscale.model.layers import transformer_config
from nlscale.model.liger import adopt, check_liger
from nlscale.parallel.carried import Carried
from nlscale.parallel.gate import Gate
from nlscale.parallel.replay import Replay
from nlscale.runtime.clock import Clock, timers
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
BACKEND = "inductor"  # of torch.compile
MicroBatch = tuple[Tensor, Tensor, Tensor]  # tokens, targets, starts, each (B, T)


@dataclass(frozen=True)
class Parallelized:
    """A model laid out over ranks: this rank's chunks and leaves, and how to run them."""

    chunks: list[Hope]
    leaves: list[Leaf]
    forward_backward: Callable[[Sequence[MicroBatch], bool], Tensor]
    carried: list[Carried]  # a chunk; none where memories begin anew at each row
    clock: Clock  # of forward passes and of the schedule
    replayed: Callable[[Sequence[MicroBatch]], Tensor] | None = None  # forward_backward of rows that levels replay

    @property
    def modules(self) -> list[nn.Module]:
        """Everything that holds parameters, in the order of the forward pass."""
        return [m for chunk in self.chunks for m in (*chunk.entrance, *chunk.blocks, *chunk.exit)]

    def pace(self, factor: float) -> None:
        """Scales the rate at which levels move inside rows, from now on."""
        for chunk in self.chunks:
            if isinstance(chunk, HopeInSequence):
                chunk.pace = factor


def multiply(dtype: torch.dtype, device: torch.device) -> None:
    """Beside weights in half precision a GPU's products of float32, which memories are, take TF32 operands; else not."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")


def stages(run: Run, pipeline_rank: int) -> list[Stage]:
    """What a pipeline rank holds: chunk v of rank p is stage v * pipeline + p."""
    count, virtual = run.parallel.stages, run.parallel.virtual_pipeline
    per = run.model.layers // count
    held = [v * run.parallel.pipeline + pipeline_rank for v in range(virtual)]
    return [
        Stage(range(s * per, (s + 1) * per), s == 0, s == count - 1, v if virtual > 1 else None)
        for v, s in enumerate(held)
    ]


def compiled(forward: Callable[..., Any], budget: float) -> Callable[..., Any]:
    """`forward` through torch.compile, which keeps `budget` of what backward wants (its own word for 1: all)."""
    made: Callable[..., Any] = torch.compile(forward, backend=BACKEND)
    if budget == 1:
        return made

    def within(*given: Any, **named: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):  # compiled at the first call
            return made(*given, **named)

    return within


def parallelize(run: Run, world: World, dtype: torch.dtype | None = None) -> Parallelized:
    """Builds, initialises and schedules the model. `dtype` overrides the precision's (float64 references)."""
    check_liger(run.train.liger)
    dtype = dtype or PRECISIONS[run.train.precision]
    multiply(dtype, world.device)
    config = transformer_config(run.model, run.parallel, dtype, world.device)
    units = Levels(levels=run.levels).units(run.model.feed_forward)
    exchange = Exchange(world.context, world.context_rank)
    chunks = [built(run, units, config, stage, exchange, world) for stage in stages(run, world.pipeline_rank)]
    leaves = [leaf for chunk in chunks for leaf in chunk.leaves()]
    initialize(leaves, run.model, run.train.seed, world.tensor_rank)
    for chunk in chunks if run.optim.second_order else ():
        chunk.head.summed = whole_loss  # one stage: the config allows no other
    for chunk in chunks:
        adopt(chunk, run.train.liger)
    if run.train.compile == "block":
        for block in (each for chunk in chunks for each in chunk.blocks if type(each) is Block):
            block.forward = compiled(block.forward, run.train.activation_budget)  # type: ignore[method-assign]
    if run.train.recompute == "block":
        for chunk in chunks:
            for block in (each for each in chunk.blocks if type(each) is Block):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]
    shared = [world.tensor] if run.parallel.sequence else []
    shared += [world.context] if run.parallel.context > 1 else []
    gates = {id(chunk): Gate(chunk.parameters(), shared) for chunk in chunks}
    sharing = [world.tensor, world.context] + ([world.data] if run.model.inner.shared else [])
    sharing = [group for group in sharing if group.size() > 1]
    carried = [
        Carried(
            chunk, run.train.global_batch // world.replicas // run.train.micro_batch, run.train.micro_batch, sharing
        )
        for chunk in (chunks if run.model.reset == "never" else ())
    ]
    clock = Clock(world.device)
    config.timers = timers(clock, backward="backward-compute")
    forward_backward = scheduled(chunks, run, gates, carried, clock)
    if not any(level.replay for level in run.levels):
        return Parallelized(chunks, leaves, forward_backward, carried, clock)
    replay, anew = Replay(leaves, run.levels), scheduled(chunks, run, gates, [], clock)

    def replayed(batches: Sequence[MicroBatch]) -> Tensor:
        with replay.read():
            return anew(batches, True)

    return Parallelized(chunks, leaves, forward_backward, carried, clock, replayed)


def built(
    run: Run, units: dict[str, int], config: TransformerConfig, stage: Stage, exchange: Exchange, world: World
) -> Hope:
    """One stage: the last one learns while it reads, where levels move inside a row."""
    shape = run.model.acting, units, run.data.sequence, config, stage, exchange
    levels = learning(run.levels)
    if not levels or not stage.last:
        return Hope(*shape)
    return HopeInSequence(*shape, Rhythm(levels, partial(all_reduce, group=world.data)))


def scheduled(
    chunks: list[Hope], run: Run, gates: dict[int, Gate], carried: Sequence[Carried], clock: Clock
) -> Callable[[Sequence[MicroBatch], bool], Tensor]:
    """The step's schedule: no pipeline, 1F1B or interleaved 1F1B, settled here once."""
    goes_on = {id(each.model): each.read for each in carried}
    schedule = get_forward_backward_func()
    rows, tokens = run.train.micro_batch, run.data.sequence

    def step(batches: Iterator[MicroBatch], model: Hope, learn: bool) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)
        read = goes_on.get(id(model)) if learn else None
        with clock.span("forward"):
            output, own = read(batch) if read else model(*batch), model.own(batch[1])
        gates[id(model)].guard(output, (own >= 0).sum())
        return output, partial(summed, targets=own)

    def forward_backward(batches: Sequence[MicroBatch], learn: bool = True) -> Tensor:
        """Runs all micro-batches; gives a float64 vector: sum of losses and targets counted, zeros off the last stage;
        then, on every rank, the targets whose gradients were added, and the micro-batches that were refused.
        """
        for gate in gates.values():
            gate.restart()
        iterators = [iter(batches) for _ in chunks]
        with clock.span("schedule"):
            losses = schedule(
                forward_step_func=partial(step, learn=learn),
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(batches),
                seq_length=tokens,
                micro_batch_size=rows,
                forward_only=not learn,
            )
        for each in carried if learn else ():
            each.settle(gates[id(each.model)].accepts)
        device = batches[0][0].device
        reported = torch.stack(losses).sum(0) if losses else torch.zeros(2, dtype=torch.float64, device=device)
        return torch.cat([reported, next(iter(gates.values())).counts])

    return forward_backward


def summed(loss: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a schedule wants of a micro-batch: the loss to differentiate, its tokens, and what to report.

    A loss that is not finite is not reported: its gradients are refused too (parallel/gate.py).
    """
    count = (targets >= 0).sum()
    facts = torch.stack([loss.detach().double(), count.double()])
    return loss, count.int(), torch.where(loss.detach().isfinite(), facts, torch.zeros_like(facts))
