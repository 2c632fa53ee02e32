"""A run as one frozen value, and the arithmetic that its sections must satisfy together."""

from dataclasses import asdict, dataclass, field, replace

from nlscale.config.cluster import Cluster
from nlscale.config.data import Data
from nlscale.config.errors import UserError, divisors, nearest, require
from nlscale.config.inner import Inner
from nlscale.config.levels import Level, Levels, parameter_names, token_levels
from nlscale.config.mixers import check_chunks, chunk_of
from nlscale.config.model import Model
from nlscale.config.optim import MATRIX_RULES, Optim
from nlscale.config.parallel import Parallel
from nlscale.config.train import Checkpoint, Identity, Log, Train


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides what a run computes. `config.yaml` in its folder is this value."""

    run: Identity = field(default_factory=Identity)
    model: Model = field(default_factory=Model)
    levels: list[Level] = field(default_factory=lambda: [Level()])
    data: Data = field(default_factory=lambda: Data(path="corpora/default"))
    optim: Optim = field(default_factory=Optim)
    parallel: Parallel = field(default_factory=Parallel)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        model, parallel, tensor = self.model, self.parallel, self.parallel.tensor
        check_heads(model, parallel)
        check_chunks(model, self.data.sequence, parallel.context)
        require(
            model.loops == 1 or parallel.stages == 1,
            f"model.loops={model.loops} passes the same blocks again, which {parallel.stages} pipeline stages do not hold "
            "together; parallel.pipeline=1 works",
        )
        require(
            model.layers % parallel.stages == 0,
            f"model.layers={model.layers} cannot be split over {parallel.stages} stages (parallel.pipeline x "
            f"parallel.virtual_pipeline); stages in {divisors(model.layers)} "
            f"or model.layers={nearest(model.layers, parallel.stages)} would work",
        )
        for name, units in Levels(levels=self.levels).units(model.feed_forward).items():
            require(
                units % tensor == 0,
                f"level {name} has {units} feed-forward units, which parallel.tensor={tensor} does not divide; "
                f"model.hidden={fitting(self.levels, model.feed_forward, tensor)} would work",
            )
        self.check_inner()
        self.check_reset()
        self.check_replay()
        self.check_surprise()
        require(
            model.variant == "independent" or not any(level.of for level in self.levels),
            f"levels: `of` parts a level side by side: it needs model.variant=independent, not {model.variant}",
        )
        self.check_optim()
        Levels(levels=self.levels).check_match(list(parameter_names(model, self.levels)))
        parts = (tensor if parallel.sequence else 1) * parallel.context
        require(
            self.data.sequence % parts == 0,
            f"data.sequence={self.data.sequence} cannot be split over {parts} ranks (parallel.context"
            f"{', and parallel.sequence over parallel.tensor' if parallel.sequence else ''}); "
            f"{nearest(self.data.sequence, parts)} would work",
        )
        if model.vocabulary is not None:
            require(
                model.vocabulary % tensor == 0,
                f"model.vocabulary={model.vocabulary} cannot be split over parallel.tensor={tensor}; "
                f"{nearest(model.vocabulary, tensor)} would work",
            )

    def check_inner(self) -> None:
        """What levels that move inside a row ask of everything else."""
        levels, model, parallel = token_levels(self.levels), self.model, self.parallel
        if not levels:
            for name, usual in asdict(Inner()).items():
                said = getattr(model.inner, name)
                require(
                    said == usual,
                    f"model.inner.{name}={said} needs a level with unit: token, such as use.levels=inside",
                )
            return
        chunk, slow = levels[0].period, levels[-1].period
        name, mixing = chunk_of(model)
        whole = divisors(self.data.sequence)
        multiples = [d for d in whole if d % mixing == 0]
        fits = [d for d in multiples if all(each.period % d == 0 for each in levels[1:2])]
        would = f"{', '.join(map(str, (fits or multiples or whole)[-6:]))} would work"
        require(
            self.data.sequence % chunk == 0,
            f"levels.{levels[0].name}.period={chunk} tokens does not divide data.sequence={self.data.sequence}; {would}",
        )
        require(
            chunk % mixing == 0,
            f"levels.{levels[0].name}.period={chunk} must be a multiple of {name}={mixing}; {would}",
        )
        require(
            slow <= self.data.sequence,
            f"levels.{levels[-1].name}.period={slow} is longer than a row; data.sequence={slow} would work",
        )
        count, held = model.inner.adaptive(model.layers), model.layers // parallel.stages
        require(
            count <= held,
            f"model.inner.layers={count} must lie on the last pipeline stage, which holds {held} layers",
        )
        for said, works in (
            (model.variant == "nested", "model.variant=independent or sequential"),
            (
                self.train.micro_batch % parallel.context > 0,
                f"train.micro_batch={nearest(self.train.micro_batch, parallel.context)}: "
                f"parallel.context={parallel.context} ranks trade tokens for rows, as a chunk waits for the one before",
            ),
            (parallel.sequence, "parallel.sequence=false"),
            (model.loops > 1, "model.loops=1"),
            (self.optim.second_order, "optim.second_order=false"),
            (model.inner.shared and parallel.pipeline > 1, "parallel.pipeline=1 with model.inner.shared"),
        ):
            require(not said, f"levels with unit: token need {works}")

    def check_reset(self) -> None:
        """What memories that go on from row to row ask of everything else."""
        model, levels = self.model, token_levels(self.levels)
        if model.reset == "row":
            return
        slow = levels[-1].period if levels else 1
        for said, works in (
            (model.mixer == "attention" and not levels, "a model.mixer with a memory, or levels with unit: token"),
            (
                model.attention == "causal" and model.mixer != "attention",
                "model.attention=document: a memory's initial state learns where documents begin",
            ),
            (self.data.shuffle, "data.shuffle=false: rows follow one another"),
            (self.data.damaged != "stop", "data.damaged=stop: no row of the sequence may be left out"),
            (len(self.data.sources) > 1, "data.path, one dataset: a mixture has no next row"),
            (self.optim.second_order, "optim.second_order=false"),
            (
                self.data.sequence % slow > 0,
                f"data.sequence={nearest(self.data.sequence, slow)}: level {levels[-1].name if levels else ''} moves "
                f"every {slow} tokens, so its window would stay open at the end of {self.data.sequence}",
            ),
            (model.inner.form == "factors", "model.inner.form=whole: pairs would grow without end"),
        ):
            require(not said, f"model.reset=never needs {works}")

    def check_replay(self) -> None:
        """What replay asks of everything else."""
        asking = [level for level in self.levels if level.replay]
        if not asking and not self.data.replay:
            return
        first = asking[0].name if asking else self.levels[-1].name
        for said, works in (
            (not asking, f"a level that counts it, such as levels.{first}.replay=1.0"),
            (not self.data.replay, f"rows: data.replay and data.replay_batch (levels.{first}.replay asks for them)"),
            (self.optim.overlap, "optim.overlap=false"),
            (self.optim.second_order, "optim.second_order=false"),
            (
                any((level.optimizer or self.optim.name) == "dgd" for level in self.levels),
                "another rule than dgd, whose windows hold inputs, too",
            ),
        ):
            require(not said, f"replay needs {works}")

    def check_surprise(self) -> None:
        """What the log's surprise asks for: that nobody but the step's own rows goes through the blocks."""
        for said, works in (
            (self.optim.second_order, "optim.second_order=false, whose steps are gone through again"),
            (self.data.replay, "no data.replay, whose rows are other ones"),
        ):
            require(not (self.log.surprise and said), f"log.surprise=true needs {works}")

    def check_optim(self) -> None:
        """What levels and their optimizer must agree on."""
        optim, first, nested = self.optim, self.levels[0], self.model.variant == "nested"
        require(
            not optim.second_order or self.train.on_spike == "flag",
            "train.on_spike=rollback cannot bring back the rows of open windows that optim.second_order holds; "
            "train.on_spike=flag would work",
        )
        require(
            not optim.overlap or (optim.reduce == "defer" and first.steps == 1 and not first.frozen),
            "optim.overlap=true reduces the first level behind every backward pass: it needs optim.reduce=defer and a "
            f"first level of period 1 that is not frozen, not optim.reduce={optim.reduce} and period {first.period}",
        )
        require(
            not nested or optim.phase == "aligned",
            "model.variant=nested needs optim.phase=aligned: a fast level starts anew where its slower one moves as a whole",
        )
        require(
            not self.train.liger or not (optim.second_order or token_levels(self.levels)),
            "train.liger has no second derivatives, which levels with unit: token and optim.second_order ask for; "
            "train.liger=[] would work",
        )
        require(
            self.model.linear.kernels == "own" or self.train.kernels == "fused",
            f"model.linear.kernels={self.model.linear.kernels} with train.kernels=reference would run other kernels still; "
            "model.linear.kernels=own would work",
        )
        plain = optim.name == "sgd" and optim.matrix.momentum == 0 and optim.clip == 0
        require(
            not optim.second_order or (nested and plain),
            "optim.second_order=true needs model.variant=nested, and steps that it can differentiate: "
            "optim.name=sgd optim.matrix.momentum=0 optim.clip=0",
        )
        for level in self.levels:
            rule = level.optimizer or optim.name
            require(
                not self.model.base_width or rule == "adamw",
                f"model.base_width says how AdamW's steps transfer over widths; level {level.name} follows {rule}",
            )
            require(
                not optim.offload or level.steps < optim.offload or rule not in MATRIX_RULES,
                f"optim.offload={optim.offload} updates level {level.name} in host memory, where {rule} has no fast "
                "matrix products; give the level optimizer: adamw, or a larger optim.offload",
            )
            require(
                not optim.time_scaled_betas or rule == "adamw",
                f"optim.time_scaled_betas=true speaks of AdamW's betas; level {level.name} follows {rule}",
            )

    @property
    def folder(self) -> str:
        """The run folder."""
        return self.run.folder or f"runs/{self.run.name}"


def check_heads(model: Model, parallel: Parallel) -> None:
    """Heads are split over tensor- and context-parallel ranks; linear memories keep all heads of their tokens."""
    trading = 1 if model.mixer in ("linear", "delta") else parallel.context
    ranks = parallel.tensor * trading
    over = "parallel.tensor" if trading == 1 else "parallel.tensor x parallel.context"
    heads = [("model.heads", model.heads)]
    heads += [("model.kv_heads", model.key_value_heads)] if model.mixer == "attention" else []
    for name, value in heads:
        require(
            value % ranks == 0,
            f"{name}={value} cannot be split over {over}={ranks}; "
            f"{over} in {divisors(value)} or {name}={nearest(value, ranks)} would work",
        )


def no_room(run: Run, world: int) -> str:
    """That a world holds no whole replicas, in words, and what would work."""
    other = run.parallel.narrower(world)
    try:
        replicas(replace(run, parallel=replace(run.parallel, **other)), world)  # type: ignore[arg-type]
        instead = f", or {' '.join(f'parallel.{k}={str(v).lower()}' for k, v in other.items())} on {world}"
    except UserError:
        instead = ""
    return (
        f"{world} rank{'s' * (world != 1)} cannot hold whole replicas of {run.parallel.said} = {run.parallel.ranks} ranks; "
        f"{run.parallel.worlds} would work{instead} (use.layout=null takes none of a table)"
    )


def replicas(run: Run, world: int) -> int:
    """Data-parallel degree of `run` on `world` ranks; raises UserError where the world or the batch does not fit."""
    train, (count, over) = run.train, divmod(world, run.parallel.ranks)
    if over:
        raise UserError(no_room(run, world))
    require(
        not run.optim.second_order or world == 1,
        f"optim.second_order=true differentiates through the fast level's steps in one process, not in {world}; "
        "--nproc 1 with parallel.tensor=1 and parallel.pipeline=1 works",
    )
    require(
        train.global_batch % (count * train.micro_batch) == 0,
        f"train.global_batch={train.global_batch} is no multiple of {count} replicas x "
        f"train.micro_batch={train.micro_batch}; {nearest(train.global_batch, count * train.micro_batch)} would work",
    )
    micro_batches, again = train.global_batch // (count * train.micro_batch), run.data.replay_batch
    unit = count * train.micro_batch * (run.parallel.pipeline if run.parallel.virtual_pipeline > 1 else 1)
    require(
        again % unit == 0,
        f"data.replay_batch={again} is no multiple of {unit} (replicas x train.micro_batch, and interleaved stages); "
        f"{nearest(again, unit)} would work",
    )
    require(
        run.model.reset == "row" or not run.model.inner.shared or micro_batches == 1,
        f"model.inner.shared with model.reset=never is one memory of all rows, which {micro_batches} micro-batches would "
        f"each continue; train.micro_batch={train.global_batch // count} would work",
    )
    require(
        run.parallel.virtual_pipeline == 1 or micro_batches % run.parallel.pipeline == 0,
        f"interleaved stages need micro-batches ({micro_batches}) in multiples of "
        f"parallel.pipeline={run.parallel.pipeline}; train.global_batch="
        f"{nearest(train.global_batch, count * train.micro_batch * run.parallel.pipeline)} would work",
    )
    return count


def fitting(levels: list[Level], hidden: int, tensor: int) -> int:
    """The next number of feed-forward units of which every level's share can be split over `tensor` ranks."""
    each = [level.width / tensor for level in levels]
    found = range(hidden, hidden * tensor + 1)  # the last of which does, as shares of `hidden` are whole numbers
    return next(units for units in found if all(abs(part * units - round(part * units)) < 1e-6 for part in each))
