"""The optimizer of a run: windows, shards, and the clock that says who moves.

A step: every shard's policy ends the step; then the groups that are due close their windows, all ranks agree on norms
and tokens in one reduction, every due group moves or, where a gradient is not finite or no target was added, none of its
ranks does; what moved travels behind the next forward pass.
"""

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nlscale.config.levels import due, level_of
from nlscale.config.optim import Optim
from nlscale.config.run import Run
from nlscale.optim.alone import AloneShard
from nlscale.optim.buffers import BufferShard
from nlscale.optim.grams import Grams
from nlscale.optim.layout import buckets
from nlscale.optim.levels import Group, by_group, groups
from nlscale.optim.mover import Moved, Mover
from nlscale.optim.nested import Anchors
from nlscale.optim.reduce import POLICIES, Policy
from nlscale.optim.rules import Rule
from nlscale.optim.schedule import level_rate
from nlscale.optim.shard import Fragment, Sharder, fragments, square
from nlscale.optim.tasks import Tasks
from nlscale.optim.window import Windows
from nlscale.runtime.clock import Clock
from nlscale.runtime.leaf import Leaf
from nlscale.runtime.world import World


@dataclass
class Optimizer:
    """All levels of this rank."""

    optim: Optim
    steps: int
    world: World
    windows: Windows
    groups: list[Group]  # of the run
    movers: dict[str, Mover]  # of this rank
    anchors: Anchors
    tasks: Tasks
    clock: Clock
    under_way: set[int] = field(default_factory=set)  # shards (by id) whose weights travel
    awaited: bool = False  # modules wait for their own weights before their next forward pass

    @torch.no_grad()
    def step(self, step: int, tokens: Tensor, replayed: Tensor | None = None) -> dict[str, Moved]:
        """Ends step `step` (from 1), whose backward passes added `tokens` targets; gives the groups that moved.

        `replayed`: targets that were added beside them, as often as each level says (`levels.X.replay`).

        A level that is not due is not touched: no collective, no optimizer work, no read by the host. (With `reduce`
        eager or hierarchical its gradients are reduced.) A collective over all ranks.
        """
        self.windows.count(tokens)
        if replayed is not None:
            share = torch.tensor([group.level.replay for group in self.groups], dtype=torch.float64)
            self.windows.tokens += share.to(self.world.device) * replayed
        with self.clock.span("reduce"):
            for mover in self.movers.values():
                for policy in mover.policies if not mover.group.level.frozen else ():
                    policy.add()
        self.windows.release()
        return self.move([group for group in self.groups if due(group.level, step, group.phase)], step)

    def flush(self, step: int) -> dict[str, Moved]:
        """At the run's end, moves every group whose window is still open: its mean counts the tokens that it has."""
        waiting = [g for g in self.groups if self.windows.open[g.name] and not g.level.frozen]
        return self.move(waiting, step)

    @torch.no_grad()
    def move(self, moving: Sequence[Group], step: int) -> dict[str, Moved]:
        """Closes the windows of these groups and moves them. A collective over all ranks."""
        if not moving:
            return {}
        held = {g.name: self.movers[g.name] for g in moving if g.name in self.movers}
        with self.clock.span("reduce"):
            grads = {name: [policy.close() for policy in mover.policies] for name, mover in held.items()}
            norms, means = self.agree(moving, {name: mover.square(grads[name]) for name, mover in held.items()})
        for name, mover in held.items():
            for gram in mover.grams:
                gram.close(means[name])
        moved = {}
        for group in moving:
            norm, square = norms[group.name], self.nothing()
            if group.name in held and norm < float("inf"):
                scale = means[group.name] * self.clip(norm, norms)
                with self.clock.span(f"level/{group.level.name}/optimizer"):
                    square = self.update(held[group.name], grads.pop(group.name), scale, step)
            elif norm < float("inf"):
                self.tasks.keep_off(group, None, [])
            moved[group.name] = Moved(norm, not norm < float("inf"), square)
        self.anchors.reset([group for group in moving if not moved[group.name].skipped], self.movers)
        for name, mover in held.items():
            if not moved[name].skipped:
                for shard in mover.shards:
                    shard.gather()
                self.under_way.update(map(id, mover.shards))
        self.windows.restart(group.name for group in moving)
        if any(move.skipped for move in moved.values()):
            self.drop_spoilt()
        if not self.awaited:
            self.arrive()
        return moved

    def drop_spoilt(self) -> None:
        """Empties every open window that is not finite on some rank; after a late find only. A collective over all ranks."""
        waiting = [group for group in self.groups if self.windows.open[group.name] and not group.level.frozen]
        bad = torch.zeros(len(waiting) + 1, device=self.world.device)
        held = [(i, self.movers[group.name]) for i, group in enumerate(waiting) if group.name in self.movers]
        for i, mover in held:
            bad[i] = ~mover.finite()
        dist.all_reduce(bad)
        spoilt = [count > 0 for count in bad.tolist()]
        for _, mover in (each for each in held if spoilt[each[0]]):
            mover.empty()
        self.windows.restart(group.name for group, gone in zip(waiting, spoilt, strict=False) if gone)

    def agree(self, moving: Sequence[Group], squares: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """Norm of each window's mean, infinite where no target was added to it, and 1 / tokens: one reduction over all
        ranks and one read by the host.
        """
        world, indices = self.world, [self.windows.groups.index(group.name) for group in moving]
        sums = torch.stack([squares.get(group.name, self.nothing()) for group in moving])
        tokens = self.windows.tokens[indices].double()
        if world.tensor_rank or world.pipeline_rank:
            tokens = torch.zeros_like(tokens)
        facts = torch.cat([sums, tokens])
        dist.all_reduce(facts)
        listed = facts.tolist()
        counts = {group.name: count for group, count in zip(moving, listed[len(moving) :], strict=True)}
        means = {name: 1 / max(1.0, count) for name, count in counts.items()}
        norms = {
            g.name: total**0.5 * means[g.name] if counts[g.name] else float("inf")
            for g, total in zip(moving, listed, strict=False)
        }
        return norms, means

    def clip(self, norm: float, norms: dict[str, float]) -> float:
        """The factor that keeps a window's mean, or all of them together, within `optim.clip`."""
        if self.optim.clip_scope == "global_due":
            norm = sum(each**2 for each in norms.values() if each < float("inf")) ** 0.5
        return min(1.0, self.optim.clip / (norm + 1e-6)) if self.optim.clip else 1.0

    def update(self, mover: Mover, grads: list[list[Tensor]], scale: float, step: int) -> Tensor:
        """Moves one group's masters; gives the squared norm of the change, float64."""
        rate = level_rate(self.optim, mover.group.level, step, self.steps)
        if mover.group.name not in self.tasks.movers:
            pairs = zip(mover.shards, grads, strict=True)
            return torch.stack([shard.update(given, rate, scale) for shard, given in pairs]).sum()
        olds = [[rule.master.clone() for rule in shard.rules] for shard in mover.shards]
        for given in grads:
            torch._foreach_mul_(given, scale)
        self.tasks.gather(mover, grads)
        for shard, given in zip(mover.shards, grads, strict=True):
            shard.update(given, rate, 1.0)
        self.tasks.pull(mover, rate)
        self.tasks.keep_off(mover.group, mover, [old for before in olds for old in before])
        squares = []
        for shard, before in zip(mover.shards, olds, strict=True):
            changes = [rule.master - old for rule, old in zip(shard.rules, before, strict=True)]
            squares.append(square(changes, shard.counted).to(self.world.device))
        return torch.stack(squares).sum()

    def bytes_sent(self, moved: Collection[str]) -> dict[str, int]:
        """Bytes this rank sends on a ring, by level, in a step in which these groups are due."""
        sent = {group.level.name: 0 for group in self.groups}
        for name, mover in self.movers.items():
            move = mover.bytes_a_move if name in moved else 0
            sent[mover.group.level.name] += move + (0 if mover.group.level.frozen else mover.bytes_a_step)
        return sent

    def fragments(self, shard: Sharder) -> Iterator[Fragment]:
        """What this rank owns of a shard."""
        return fragments(shard, self.world)

    def updates(self) -> dict[str, int]:
        """How often each group's rules moved; nested flats count from their last reset."""
        return {key: rule.updates for key, rule in self.rules()}

    def set_updates(self, counts: Mapping[str, int]) -> None:
        """Takes over what `updates` gave; a group that is not named begins at 0."""
        for key, rule in self.rules():
            rule.updates = int(counts.get(key, 0))

    def rules(self) -> Iterator[tuple[str, Rule]]:
        """Every rule of this rank under its group's name."""
        for name, mover in self.movers.items():
            for shard in mover.shards:
                for flat, rule in zip(shard.flats, shard.rules, strict=True):
                    yield (f"{name}/nested" if flat.kind.nested else name), rule

    def publish(self) -> None:
        """Makes every rank's weights from the masters, after those were loaded. A collective."""
        for mover in self.movers.values():
            for shard in mover.shards:
                shard.write(everything=True)
                shard.gather()
        self.arrive()

    def nothing(self) -> Tensor:
        """A float64 zero."""
        return torch.zeros((), dtype=torch.float64, device=self.world.device)

    def await_in(self, modules: Iterable[nn.Module]) -> None:
        """Lets each of these modules wait for its own weights when it is next called, instead of all at the step's end."""
        for module in modules:
            own = set(module.parameters())
            shards = [shard for shard in self.shards() if any(leaf.parameter in own for leaf in shard.leaves)]
            module.register_forward_pre_hook(lambda *_, shards=shards: self.await_these(shards))
        self.awaited = True

    def await_these(self, shards: Sequence[Sharder]) -> None:
        """Waits for the weights that a module is about to use, where they are under way."""
        waiting = [shard for shard in shards if id(shard) in self.under_way]
        if waiting:
            with self.clock.span("gather"):
                arrive(waiting)
            self.under_way.difference_update(map(id, waiting))

    def shards(self) -> list[Sharder]:
        """All shards of this rank."""
        return [shard for mover in self.movers.values() for shard in mover.shards]

    def arrive(self) -> None:
        """Waits until all weights are where the model computes with them."""
        arrive(self.shards())
        self.under_way.clear()


def arrive(shards: Iterable[Sharder]) -> None:
    """Waits for what these shards gather."""
    for shard in shards:
        shard.arrive()


def build_optimizer(run: Run, leaves: Sequence[Leaf], world: World, steps: int | None = None) -> Optimizer:
    """Windows over all stored parameters and shards for each group that has leaves. A collective over all ranks.

    `steps`: of the schedule, if not those of the run.
    """
    optim, staggered = run.optim, run.optim.phase == "staggered"
    every = groups(run.levels, run.model.layers, staggered)
    moving = dict.fromkeys(leaf.parameter for leaf in leaves if not level_of(leaf.name, run.levels).frozen)
    for leaf in leaves:
        leaf.parameter.requires_grad_(leaf.parameter in moving)
    windows = Windows(moving, [g.name for g in every], lasting=optim.reduce == "defer")
    members = by_group(leaves, run.levels, run.model.layers, staggered)
    movers = {}
    usual: Callable[..., Sharder] = zero_shard() if world.copies > 1 else AloneShard
    for group in every:
        shards: list[Sharder] = []
        for bucket in buckets(members[group.name], optim.bucket, group.level.optimizer or optim.name):
            behind = optim.overlap and group is every[0]
            sharder = BufferShard if behind else usual
            shards.append(sharder(group.level, bucket, run, windows, world))
        if shards:
            policies: list[Policy] = [POLICIES[optim.reduce](shard, windows, world) for shard in shards]
            ruled = [leaf for s in shards for f in s.flats if f.kind.rule == "dgd" for leaf, _ in f.places]
            grams = [Grams(ruled, windows, world)] if ruled and not group.level.frozen else []
            movers[group.name] = Mover(group, shards, policies, grams)
    anchors = Anchors(run.levels if run.model.variant == "nested" else [], optim.slow_weight, movers)
    tasks = Tasks(every, movers, world)
    return Optimizer(
        optim, steps or run.train.steps, world, windows, every, movers, anchors, tasks, Clock(world.device)
    )


def zero_shard() -> Callable[..., Sharder]:
    """DeepSpeed's, imported where copies share a shard: one rank alone needs none of it, and not to have it installed."""
    found: Callable[..., Sharder] = importlib.import_module("nlscale.optim.zero").ZeroShard
    return found
