"""Memory and time of a layout by formula, without torch: what `nlscale check` says, and what layouts are ranked by.

Times are work over the rates of config/devices.py.
"""

from dataclasses import dataclass
from functools import cached_property

from nlscale.config.devices import MEMORIES, PRODUCTS, SCORES, STREAM, WIRE, Device
from nlscale.model.count import FLOPS, flops_a_token
from nlscale.plan.holding import Holding, beat


@dataclass(frozen=True)
class Times:
    """Seconds of a step, by what they are spent on."""

    products: float
    scores: float  # attention, or memories
    stream: float  # reading and writing activations
    tensor: float  # collectives inside a layer
    pipeline: float  # messages between stages
    bubble: float  # waiting for the first and last micro-batch, and for the last stage, which has the head
    data: float  # reductions and gathers of levels, the mean over a period
    optimizer: float

    @property
    def step(self) -> float:
        """All of them: nothing is taken to overlap."""
        return sum(vars(self).values())


class Estimate(Holding):
    """What a run on so many ranks holds, and how long it takes. Raises UserError where the layout does not fit them."""

    def times(self, device: Device) -> Times:
        """Of a step on such GPUs."""
        run, model, parallel = self.run, self.run.model, self.run.parallel
        peak = device.flops if self.width == 2 else device.flops_fp32
        again = 4 / 3 if run.train.recompute == "block" else 1.0
        inner = parallel.tensor * parallel.context
        tokens = self.tokens * parallel.context
        mixing = 3.0 * model.layers * model.loops * FLOPS[model.mixer](model, run.data.sequence)
        products = self.useful - mixing
        share = SCORES if model.mixer == "attention" else MEMORIES
        stages, virtual, count = parallel.pipeline, parallel.virtual_pipeline, self.micro_batches
        each = Times(
            products=tokens * products * again / (inner * stages * peak * PRODUCTS),
            scores=tokens * mixing * again / (inner * stages * peak * share),
            stream=3 * again * self.kept(False) * model.layers * model.loops / stages / (device.bandwidth * STREAM),
            tensor=self.inside(device) * again,
            pipeline=self.between(device),
            bubble=0.0,
            data=0.0,
            optimizer=0.0,
        )
        moved = self.moved()
        return Times(
            **{
                name: value * count for name, value in vars(each).items() if name not in ("bubble", "data", "optimizer")
            },
            bubble=each.step * (stages - 1) / virtual + count * self.behind(peak),
            data=self.over_data(device, moved),
            optimizer=30 * moved / self.copies / (device.bandwidth * STREAM) + self.over_host(device),
        )

    def behind(self, peak: float) -> float:
        """Seconds a micro-batch by which the last stage, which alone has the head, is slower than the mean one."""
        model, parallel = self.run.model, self.run.parallel
        assert model.vocabulary is not None
        head = 6 * self.tokens * model.width * model.vocabulary / (parallel.tensor * peak * PRODUCTS)
        return head * (1 - 1 / parallel.pipeline)

    def inside(self, device: Device) -> float:
        """Seconds of a micro-batch's collectives inside layers."""
        run, ranks, around = self.run, self.run.parallel.tensor, self.run.parallel.context
        row = self.tokens * run.model.width * self.width
        layers = run.model.layers * run.model.loops / run.parallel.pipeline
        over = (10 if run.parallel.sequence else 8) * row * (ranks - 1) / ranks
        traded = 8 * row / ranks * (around - 1) / around
        near = device.link if ranks * around <= device.node else device.network
        return layers * (over / device.link + traded / near) / WIRE

    def over_data(self, device: Device, moved: float) -> float:
        """Seconds a step of reducing and gathering levels, the mean over their periods."""
        optim, far = self.run.optim, self.size > device.node
        link = min(device.link, device.network * self.together(device.node)) if far else device.link
        share = (self.copies - 1) / self.copies
        every = self.mean(lambda level: 1.0)
        if optim.reduce == "hierarchical":
            near, nodes = self.near, max(1, self.copies // self.near)
            inside, across = every * (near - 1) / near / device.link, moved / near * (nodes - 1) / nodes
            across /= device.network if far else device.link
        else:
            inside, across = 0.0, (every if optim.reduce == "eager" else moved) * share / link
        return self.width * (inside + across + moved * share / link) / WIRE

    def together(self, node: int) -> int:
        """Copies of a shard among the GPUs of a node, by which what they send leaves it at once."""
        parallel = self.run.parallel
        inner = parallel.tensor * parallel.context
        if inner > node:
            return max(1, node // parallel.tensor)
        return min(self.copies, parallel.context * max(1, node // parallel.ranks))

    def over_host(self, device: Device) -> float:
        """Seconds a step in which what is kept in host memory comes and goes, and is moved there."""
        optim, levels = self.run.optim, self.run.levels
        away = [level for level in levels if optim.offload and level.steps >= optim.offload]
        held = self.parameters(0)
        return sum(24 * held[level.name] * beat(level) / self.copies for level in away) / (device.host * STREAM)

    def between(self, device: Device) -> float:
        """Seconds of a micro-batch's messages to the next stage and back."""
        parallel = self.run.parallel
        if parallel.pipeline == 1:
            return 0.0
        split = parallel.tensor if parallel.sequence else 1
        size = self.tokens * self.run.model.width * self.width / split
        near = 2 * parallel.tensor * parallel.context <= device.node
        return 2 * parallel.virtual_pipeline * size / ((device.link if near else device.network) * WIRE)

    @cached_property
    def useful(self) -> float:
        """Operations that a token asks for."""
        return flops_a_token(self.run.model, self.run.levels, self.run.data.sequence)

    def mfu(self, device: Device, times: Times | None = None) -> float:
        """Useful operations over what the GPUs could do; `times`: on them, where they are known."""
        run = self.run
        peak = device.flops if self.width == 2 else device.flops_fp32
        work = self.useful * run.train.global_batch * run.data.sequence
        return work / ((times or self.times(device)).step * peak * self.size)
