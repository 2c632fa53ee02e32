"""A run, from its recipe or from where its folder left off, to its last step."""

import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from nlscale_kernels.switch import kernels

from nlscale.config.errors import SavedOnSignal, StoppedOnPurpose, UserError, require
from nlscale.config.read import dump
from nlscale.config.run import Run, replicas
from nlscale.data.card import Card, check_data
from nlscale.optim.build import build_optimizer
from nlscale.parallel.apply import PRECISIONS, Parallelized, parallelize
from nlscale.runtime.alone import together
from nlscale.runtime.folder import Folder, write_durably
from nlscale.runtime.holder import Hold
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.log import Journal
from nlscale.runtime.outcome import tell
from nlscale.runtime.watch import Watch, sparing_children
from nlscale.runtime.watchdog import HUNG, Watchdog
from nlscale.runtime.world import World, join, leave
from nlscale.train.agree import led
from nlscale.train.checkpoint import Checkpoints
from nlscale.train.curve import Curve
from nlscale.train.metrics import Metrics
from nlscale.train.out_of_memory import remember
from nlscale.train.peak import peak_flops
from nlscale.train.replicas import differing
from nlscale.train.second_order import SecondOrder
from nlscale.train.sources import open_held_out, open_loader, open_replay
from nlscale.train.spikes import Spikes
from nlscale.train.state import TrainState
from nlscale.train.step import BeforeMove, Report, held_out_loss, nothing, train_step
from nlscale.train.stragglers import Stragglers
from nlscale.train.trace import Tracer

LAST = 120.0  # seconds that a run which ends early waits for the save under way
SKIPS = 10  # steps in a row with losses or gradients that are not finite, until the run is given up


def train(run: Run, watch: Watch | None = None) -> None:
    """Trains one run on this rank; the run folder exists. `watch`: has heard signals since before this; unset: from now.

    Raises UserError for what the user must mend, SavedOnSignal after a signal, StoppedOnPurpose where going on would
    not help.
    """
    if watch is None:
        with Watch() as watch:
            return train(run, watch)
    with kernels(run.train.kernels):
        return train_here(run, watch)


def train_here(run: Run, watch: Watch) -> None:
    """The run on this rank, by the operators' chosen forms."""
    world = join(run.parallel, run.cluster, run.train.seed, node_of(run))
    remember(run.log.allocations)
    replicas(run, world.size)
    cards, folder = check_data(run.data, run.train.evaluate_rows > 0), Folder(Path(run.folder))
    journal = Journal(folder, world.leads)
    hold = Hold(folder.path, run.cluster.lease)
    taken = led(world, hold.take)
    try:
        if taken:
            journal.event("takeover", 0, what=taken)
            journal.say(taken)
        from_where_it_stands(run, world, cards, folder, journal, hold, watch)
    except SavedOnSignal:
        hold.release()  # before any rank ends, and has the others ended by its launcher
        together()
        raise
    finally:
        hold.release()
    leave()


def from_where_it_stands(
    run: Run,
    world: World,
    cards: Sequence[Card],
    folder: Folder,
    journal: Journal,
    hold: Hold,
    watch: Watch,
) -> None:
    """The run on this rank, its folder held."""
    state, model = built(run, world, cards)
    checkpoints = Checkpoints(run, world, folder, journal, hold)
    resumed = checkpoints.restore(state)
    if state.step < run.train.steps:
        if world.leads:
            write_durably(folder.config, dump(run))
        try:
            going_on(state, model, checkpoints, cards[0].document, folder, journal, resumed, watch)
        except (UserError, StoppedOnPurpose):  # what every rank ends for: a save under way may come to its end
            checkpoints.beside.end(LAST)
            raise
    else:
        journal.say(f"the run is finished: step {state.step} of {run.train.steps}")


def built(run: Run, world: World, cards: Sequence[Card]) -> tuple[TrainState, Parallelized]:
    """A run at its beginning. A collective."""
    model = parallelize(run, world)
    optimizer = build_optimizer(run, model.leaves, world)
    optimizer.await_in(model.modules)
    state = TrainState(run, world, model.leaves, optimizer, open_loader(run, world), cards, model.carried)
    if run.data.replay:
        state.replay, state.replay_fingerprint = open_replay(run, world)
    return state, model


def node_of(run: Run) -> int | None:
    """Replicas of a node, as `join` asks for them; 0 where gradients cross no nodes apart."""
    return run.optim.node if run.optim.reduce == "hierarchical" else 0


def going_on(
    state: TrainState,
    model: Parallelized,
    checkpoints: Checkpoints,
    document: int,
    folder: Folder,
    journal: Journal,
    resumed: bool,
    watch: Watch,
) -> None:
    """The steps that remain."""
    run, world = state.run, state.world
    held_out = open_held_out(run, world)
    peak, source = peak_flops(run.log.peak_flops, PRECISIONS[run.train.precision], world.device)
    journal.event("start", state.step, world=world.size, replicas=world.replicas, peak_flops=peak, peak_source=source)
    where = f"goes on after step {state.step}" if resumed else "starts"
    journal.say(f"{run.run.name} {where}: {world.words}")
    before_move = opening(state, model, journal)
    last = min(run.train.steps, run.train.stop_at or run.train.steps)
    watchdog = Watchdog(
        folder.path / "alive", world.rank, world.size, run.cluster.watchdog, partial(hung, state, folder)
    )
    checkpoints.waiting, tracer = watchdog.note, Tracer(run, world, folder, journal)
    curve, began = Curve(folder, journal, checkpoints.hold, world.leads), state.step
    checkpoints.hold.await_silence()
    with Metrics(state, folder, journal, peak, checkpoints.hold, model.chunks) as metrics, watchdog, curve:
        skips, stragglers, spikes = 0, Stragglers(world, journal), Spikes(state, checkpoints, journal)
        while state.step < last:
            compiles = state.step == began  # by processes that a signal to the whole job would end
            with tracer.step(state), sparing_children() if compiles else nullcontext():
                report = train_step(state, model, document, partial(stopping, watch, checkpoints), before_move)
            watchdog.note(f"step {state.step}")
            metrics.record(report)
            if report.tokens:
                stragglers.heard(state.step, report.own)
                skips = alarmed(report, skips, state.step, journal)
            if math.isfinite(report.loss) and spikes.heard(report.loss):
                metrics.rolled_back()
                continue
            compared(state, model.leaves, journal, checkpoints.due(state))
            evaluate = partial(evaluated, state, model, held_out, document, metrics)
            saving_first = report.stop and state.step < last  # the save that a signal asks for does not wait
            if not saving_first and evaluate():
                watchdog.note(f"the held-out loss of step {state.step}")
            if save_where_due(state, checkpoints, report, last):
                watchdog.note(f"the save of step {state.step}")
                metrics.ledger()
                if not report.stop:
                    curve.renew(state.step)
            if report.stop and state.step < last:
                evaluate()
                journal.event("stop", state.step, signal=watch.asked)
                raise SavedOnSignal(f"saved at step {state.step} on a signal; the same command goes on")
    journal.event("end", state.step)


def save_where_due(state: TrainState, checkpoints: Checkpoints, report: Report, last: int) -> bool:
    """Saves at the interval, at the `last` step and for a signal; whether this was one of them. A collective.

    A step without a finite loss is never saved, as its weights may be what is wrong: where it is the last, or a signal's,
    it raises StoppedOnPurpose or SavedOnSignal, and the last checkpoint stands.
    """
    step, ends = state.step, state.step == last
    if report.tokens and not math.isfinite(report.loss):
        if ends:
            raise StoppedOnPurpose(f"no loss is finite at step {step}, the last; the last checkpoint stands")
        if report.stop:
            raise SavedOnSignal(
                f"stopped on a signal at step {step}, which has no finite loss; the last checkpoint stands"
            )
        return False
    if not (checkpoints.due(state) or report.stop or ends):
        return False
    saved = checkpoints.save(state, wait=report.stop or ends)
    if not saved and report.stop and not ends:
        raise RuntimeError(f"the save that a signal asked for at step {step} failed; the one before stands")
    require(saved or not ends, "the last save failed; mend that and go on")
    return True


def opening(state: TrainState, model: Parallelized, journal: Journal) -> BeforeMove:
    """What happens between backward and the levels' move."""
    run = state.run
    if not run.optim.second_order:
        return nothing
    if state.step % run.levels[-1].period:
        journal.say("the slow copies' next steps are first order: the rows of their open windows are gone")
    return SecondOrder(run, model, state.optimizer).before


def evaluated(
    state: TrainState, model: Parallelized, held_out: tuple[np.ndarray, int] | None, document: int, metrics: Metrics
) -> bool:
    """The held-out loss, where this step ends with one; whether it does."""
    if held_out is None or not evaluation_due(state):
        return False
    began = time.monotonic()
    metrics.evaluated(held_out_loss(state, model, held_out, document), time.monotonic() - began)
    return True


def stopping(watch: Watch, checkpoints: Checkpoints) -> bool:
    """Whether this rank knows a reason to end at this step."""
    return watch.asked is not None or checkpoints.failed or checkpoints.hold.replaced


def compared(state: TrainState, leaves: Sequence[Leaf], journal: Journal, saving: bool) -> None:
    """Holds the weights that ranks have in common against each other, when it is time, or before they are saved.

    Raises RuntimeError naming the ranks that differ: what they computed is not saved, and a restart goes on before it.
    """
    interval = state.run.train.compare
    if not interval or state.world.size == 1 or (state.step % interval and not saving):
        return
    state.optimizer.arrive()  # what the last move gathers
    if odd := differing(leaves, state.world):
        journal.event("weights differ", state.step, ranks=odd)
        raise RuntimeError(f"step {state.step}: the weights of {', '.join(odd)} are not those of the other replicas")


def hung(state: TrainState, folder: Folder, cause: str, hosts: Sequence[str]) -> None:
    """What the watchdog's last words are; `hosts`: of the ranks that are missing."""
    Journal(folder, True).event("hung", state.step, rank=state.world.rank, cause=cause)
    tell(HUNG, state.world.rank, cause, hosts)
    print(f"nlscale: {cause}", file=sys.stderr, flush=True)


def alarmed(report: Report, skips: int, step: int, journal: Journal) -> int:
    """Steps in a row in which something was not finite, this one included; raises StoppedOnPurpose after SKIPS of them."""
    if not report.skipped and not report.refused:
        return 0
    journal.event("skip", step, levels=report.skipped, micro_batches=report.refused)
    if skips + 1 == SKIPS:
        raise StoppedOnPurpose(f"losses or gradients were not finite in {SKIPS} steps in a row, up to step {step}")
    return skips + 1


def evaluation_due(state: TrainState) -> bool:
    """Whether this step ends with a held-out loss."""
    interval = state.run.train.evaluate_interval
    return state.step == state.run.train.steps or bool(interval and state.step % interval == 0)
