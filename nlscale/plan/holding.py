"""What a rank of a layout holds, by formula and without torch.

What a block keeps for backward was counted in the simulation (plan/simulate.py), a token and unit of width, for each
mixer; a test holds the formula against it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from nlscale.config.levels import Level, Levels, learning, level_of, parameter_names
from nlscale.config.model import Model
from nlscale.config.optim import STATES
from nlscale.config.run import Run, replicas
from nlscale.config.shapes import units_of
from nlscale.model.count import inward, sizes

# Bytes that a block keeps in bf16 a token and unit of width: beside the mixer, on all of a row's tokens ...
BESIDE = 20.0
# ... by the mixer, on this rank's heads. Attention: without and for its keys and values.
KEPT = {
    "attention": 7.4,
    "linear": 58.6,
    "delta": 65.8,
    "written": 24.0,
    "titans": 73.0,
    "titans_mac": 40.1,
    "titans_mag": 104.3,
    "titans_mal": 90.1,
    "self_modifying": 40.5,  # and what chunks add (`by_chunks`)
}
PAIRS = 4.6
ON_CHIP = 64  # width and units of a main memory whose weights stay on chip from chunk to chunk
# Projections of all heads' width that one product computes together, beside keys and values of attention.
FUSED = {
    "attention": 1,
    "linear": 4,
    "delta": 4,
    "written": 3,
    "titans": 4,
    "titans_mac": 4,
    "titans_mag": 6,
    "titans_mal": 7,
    "self_modifying": 2,
}
HIDDEN = {"swiglu": 8.0, "gelu": 6.0}  # ... and of the feed-forward, a hidden unit
LOGITS = 4  # float32 copies of a chunk of logits
CHUNK, WIDE = 512, 2**24  # tokens, and logits, of a chunk of the loss, at most (kernels/summed_loss)
NODE = 8  # GPUs of a node, where no cluster is named
AT_ONCE = 5.0  # bytes an element of the largest bucket, while a level moves


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of a pipeline stage."""

    weights: float
    windows: float
    masters: float
    moments: float
    host: float
    states: float  # of memories that never begin anew
    activations: float
    moving: float

    @property
    def resident(self) -> float:
        """At the peak."""
        held = self.weights + self.windows + self.masters + self.moments + self.states
        return held + max(self.activations, self.moving)


Counted = dict[tuple[str, str], tuple[int, int]]


def count(run: Run) -> Counted:
    """(embed, head or block; level) -> parameters that tensor-parallel ranks share, and those that each has whole."""
    found: Counted = {}
    elements = sizes(run.model, run.levels)
    for name in parameter_names(replace(run.model, layers=1), run.levels):  # blocks are alike
        each = elements(name)
        place = "head" if name == "norm.weight" else name.split(".")[0]
        each *= run.model.layers if place == "blocks" else 1
        key = place, level_of(name, run.levels).name
        cut, whole = found.get(key, (0, 0))
        found[key] = (cut, whole + each) if name.endswith(("norm.weight", "gains")) else (cut + each, whole)
    return found


class Holding:
    """A run on so many ranks. Raises UserError where the layout does not fit them."""

    def __init__(self, run: Run, size: int, counted: Counted | None = None) -> None:
        """`counted`: of the same model and levels, where it is known (`count`)."""
        self.run, self.size = run, size
        self.counted = count(run) if counted is None else counted
        self.replicas = replicas(run, size)
        self.copies = self.replicas * run.parallel.context
        self.width = 2 if run.train.precision == "bf16" else 4
        self.micro_batches = run.train.global_batch // (self.replicas * run.train.micro_batch)
        self.tokens = run.train.micro_batch * run.data.sequence // run.parallel.context  # of a micro-batch, here

    @cached_property
    def node(self) -> int:
        """Replicas of one node, where gradients are reduced inside nodes first."""
        gpus = self.run.cluster.ranks if self.run.cluster.ranks > 1 else NODE
        return min(self.replicas, self.run.optim.node or max(1, gpus // self.run.parallel.ranks))

    @property
    def near(self) -> int:
        """Copies of a shard in one node, likewise."""
        return self.node * self.run.parallel.context

    @cached_property
    def held(self) -> dict[tuple[str, str], int]:
        """(embed, head or block; level) -> parameters of one rank: of all blocks, or of the embedding or head."""
        return {key: cut // self.run.parallel.tensor + whole for key, (cut, whole) in self.counted.items()}

    def parameters(self, rank: int) -> dict[str, float]:
        """By level, of a rank of a pipeline stage."""
        stages = self.run.parallel.pipeline
        found = dict.fromkeys((level.name for level in self.run.levels), 0.0)
        ends = {"embed": [0, stages - 1] if self.run.model.tied else [0], "head": [stages - 1]}
        for (place, level), count in self.held.items():
            if place == "blocks":
                found[level] += count / stages
            elif rank in ends[place]:
                found[level] += count
        return found

    def kept(self, recomputed: bool) -> float:
        """Bytes that a block keeps of a micro-batch."""
        run, model, ranks = self.run, self.run.model, self.run.parallel.tensor
        split = ranks if run.parallel.sequence else 1
        if recomputed:
            return float(self.tokens * model.width * self.width / split)
        pairs = PAIRS * model.key_value_heads / model.heads if model.mixer == "attention" else 0.0
        mixing = (KEPT[model.mixer] + pairs + by_chunks(run)) * model.width / ranks
        behind = HIDDEN[model.activation] * model.feed_forward / ranks
        return self.tokens * (BESIDE * model.width / split + mixing + behind) * self.width / 2

    def memory(self, rank: int) -> Memory:
        """Of a rank of a pipeline stage."""
        optim, levels = self.run.optim, self.run.levels
        held = self.parameters(rank)
        total = sum(held.values())
        share = {"defer": 1.0, "eager": 1 / self.copies, "hierarchical": 1 / self.near}[optim.reduce]
        masters, moments, host = 0.0, 0.0, 0.0
        for level in levels:
            own = 4 * held[level.name] / self.copies
            states = own * len(STATES[level.optimizer or optim.name])
            if optim.offload and level.steps >= optim.offload:
                host += own + states
            else:
                masters, moments = masters + own, moments + states
        kept = self.states(rank)
        return Memory(
            weights=self.width * (total + self.sliced()),
            windows=4 * total * share,
            masters=masters,
            moments=moments,
            host=host,
            states=kept,
            activations=self.activations(rank) + kept + (4 * total if optim.reduce != "defer" else 0.0),
            moving=4 * total / self.copies + (AT_ONCE * self.bucket(held) if self.copies > 1 else 0.0),
        )

    def states(self, rank: int) -> float:
        """Bytes of what this replica's rows leave to the next ones, on a rank of a pipeline stage."""
        model, parallel = self.run.model, self.run.parallel
        memories, copies = carried(self.run)
        around = 1 if model.mixer in ("linear", "delta") else parallel.context
        held = memories / (around * parallel.pipeline * self.replicas)
        if rank == parallel.pipeline - 1:
            held += copies / (1 if model.inner.shared else self.replicas * parallel.context)
        return held / parallel.tensor

    def sliced(self) -> float:
        """Parameters that lie twice: in the memory that is gathered, and in a product's fused weight."""
        model, ranks, stages = self.run.model, self.run.parallel.tensor, self.run.parallel.pipeline
        layers, pairs = model.layers / stages, model.key_value_heads * model.head_width
        fused = 2 if model.activation == "swiglu" else 1
        several = sum(level.width > 0 for level in self.run.levels) > 1
        cut = (fused if fused > 1 or several else 0) + (1 if several else 0)
        inner = model.heads * model.head_width
        mixing = model.width * (FUSED[model.mixer] * inner + (2 * pairs if model.mixer == "attention" else 0))
        return layers * (mixing + cut * model.width * model.feed_forward) / ranks

    def bucket(self, held: dict[str, float]) -> float:
        """Elements of the largest bucket of a level."""
        layers = self.run.model.layers / self.run.parallel.pipeline
        largest = max(held.values())
        return min(largest, max(float(self.run.optim.bucket), largest / layers))

    def flying(self, rank: int) -> float:
        """Micro-batches whose activations a pipeline rank holds at once, in whole stages."""
        stages, virtual = self.run.parallel.pipeline, self.run.parallel.virtual_pipeline
        if virtual == 1:
            return min(self.micro_batches, stages - rank)
        return min(self.micro_batches * virtual, 2 * (stages - rank - 1) + (virtual - 1) * stages + 1) / virtual

    def activations(self, rank: int) -> float:
        """At the peak of the schedule."""
        run, model = self.run, self.run.model
        layers = model.layers * model.loops / run.parallel.pipeline
        recomputed = run.train.recompute == "block"
        held = self.flying(rank) * layers * self.kept(recomputed)
        # Of HOPE's chunks, backward lets go one after the other.
        again = 1.2 if model.mixer == "self_modifying" and not model.self_modifying.recompute else 1.4
        inside = self.kept(False) * (again if recomputed else 0.4)  # of the block that backward is in
        if rank < run.parallel.pipeline - 1:
            return held + inside
        assert model.vocabulary is not None
        rows = model.vocabulary / run.parallel.tensor
        chunk = min(self.tokens, CHUNK, max(1, WIDE // rows))
        loss = LOGITS * 4 * chunk * rows + 4 * rows * model.width + 2 * self.tokens * model.width * self.width
        return held + max(inside, loss)

    @property
    def largest(self) -> float:
        """Resident bytes of the rank that holds most: the first stage has most in flight, the last one the loss."""
        return max(self.memory(rank).resident for rank in {0, self.run.parallel.pipeline - 1})

    @property
    def beside(self) -> float:
        """Bytes in host memory of the rank that holds most there."""
        return max(self.memory(rank).host for rank in {0, self.run.parallel.pipeline - 1})

    def mean(self, weighs: Callable[[Level], float]) -> float:
        """Parameters of a rank, each counted by its level, the mean over stages."""
        by_name = {level.name: weighs(level) for level in self.run.levels}
        return sum(count * by_name[level] for (_, level), count in self.held.items()) / self.run.parallel.pipeline

    def moved(self) -> float:
        """Parameters of a rank that move a step, the mean over stages and periods: the sum of width / period."""
        return self.mean(beat)


def carried(run: Run) -> tuple[float, float]:
    """Bytes of what a step's rows leave to the next ones, over all ranks: mixers' memories, and what token levels learned.

    Nothing where memories begin anew at each row.
    """
    model, rows = run.model, run.train.global_batch
    if model.reset == "row":
        return 0.0, 0.0
    memories = 4.0 * rows * state_elements(model) * model.heads * model.layers * model.loops
    units, width = Levels(levels=run.levels).units(model.feed_forward), 2 if run.train.precision == "bf16" else 4
    own = sum(units[level.name] for level in learning(run.levels))
    parts = inward(model) * model.inner.adaptive(model.layers)
    return memories, float((1 if model.inner.shared else rows) * width * parts * model.width * own)


def state_elements(model: Model) -> int:
    """Of one head's memory, momentum and the convolution's last tokens included."""
    width, settings = model.head_width, model.self_modifying
    if model.mixer in ("linear", "delta"):
        return width * width + 3 * width * (model.linear.convolution - 1)
    if model.mixer == "self_modifying":
        inward, units = units_of(settings, width)
        vectors = len(settings.vectors) + 1
        nets = (vectors + 2) * width * inward + vectors * width * units + 2 * units
        return (2 if settings.momentum else 1) * nets + width * (settings.convolution - 1)
    if model.mixer == "written":
        return width * width
    if model.mixer.startswith("titans"):
        tail = 0 if model.mixer == "titans_mac" else 3 * width * (model.titans.convolution - 1)
        return 2 * width * sum(units_of(model.titans, width)) + tail
    return 0


def by_chunks(run: Run) -> float:
    """Bytes that self-modifying Titans keep beside, a token and unit of width: a turn of each chunk of the main memory, the
    states at which chunks of the makers begin, an output gate; all that is otherwise computed again.
    """
    if run.model.mixer != "self_modifying":
        return 0.0
    settings, width = run.model.self_modifying, run.model.head_width
    went_on = 1 - settings.makers / run.data.sequence if run.model.reset == "row" else 1.0
    states = (64.0 if settings.momentum else 32.0) * sum(units_of(settings, width)) / 2 / settings.makers * went_on
    extra = 8.0 * settings.gate - 1.1 * (not settings.momentum)
    if not settings.recompute:
        inward, units = units_of(settings, width)
        extra += (32.0 + 64.0 * inward / width) * went_on
        if settings.activation == "silu" and max(inward, width) <= ON_CHIP and not settings.per_layer:
            extra += 41.0 + 17.0 * width / settings.chunk
        else:
            extra += 30.0 + 32.0 * inward / width + 24.0 * (inward + units) / settings.chunk
        if settings.per_layer:  # W1's inputs, and how its writes arrive, of each memory that writes
            memories = 1 + (len(settings.vectors) + 2) * went_on
            extra += memories * (14.0 + 28.0 * units / settings.chunk) * units / width
    return 4.6 * width / settings.chunk + states + extra


def beat(level: Level) -> float:
    """Moves a step."""
    return 0.0 if level.frozen else 1 / level.steps
