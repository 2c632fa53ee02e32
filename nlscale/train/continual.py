"""Levels that change at a resume: another period, a frozen level, a new level; only when `checkpoint.levels=change` asks.

What stays the same parameter keeps its weight and moments. A new one begins as a new model's would, but for its output
projection, which is zero, so that the network computes what it computed. An open window goes on if its group has the
same parameters as before, and closes at its next boundary, whatever the period; any other open window is dropped, and
the journal says which.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlscale.config.errors import UserError
from nlscale.config.levels import Level, level_of
from nlscale.optim.build import Optimizer
from nlscale.optim.nested import SLOW
from nlscale.optim.tasks import ANCHOR, DIRECTION, IMPORTANCE, state_names

FIELDS = ("shape", "level", "clock", "rule", "decay")


@dataclass(frozen=True)
class Change:
    """What differs between a checkpoint's levels and a run's."""

    new: frozenset[str]  # parameters that the checkpoint does not have
    moved: dict[str, str]  # parameter -> its level and clock, then -> now
    kept: frozenset[str]  # groups whose open windows go on

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.new or self.moved)


def compare(now: Mapping[str, str], then: Mapping[str, str], path: Path, allowed: bool) -> Change:
    """The change from `then` to `now` (see optim.levels.identity).

    Raises UserError where anything differs and nothing was asked for, or where the model itself is another.
    """
    names = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    strange = [name for name in names if name not in now or (name in then and not same_tensor(now[name], then[name]))]
    if names and (strange or not allowed):
        shown = (strange or names)[:3]
        lines = [f"{name}: {then.get(name, 'absent')} -> {now.get(name, 'absent')}" for name in shown]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        hint = "give another run.name" if strange else "checkpoint.levels=change goes on with the new ones"
        raise UserError(f"{path} holds another model or other levels: {'; '.join(lines)}{more}; {hint}")
    moved = {name: f"{beat(then[name])} -> {beat(now[name])}" for name in names if name in then}
    before, after = members(then), members(now)
    kept = frozenset(group for group in after if before.get(group) == after[group])
    return Change(frozenset(now.keys() - then.keys()), moved, kept)


def same_tensor(now: str, then: str) -> bool:
    """Whether two lines differ in level and clock at most."""
    a, b = (dict(zip(FIELDS, line.split(), strict=True)) for line in (now, then))
    return all(a[field] == b[field] for field in ("shape", "rule", "decay"))


def beat(line: str) -> str:
    """Level and clock of an identity line."""
    return " ".join(line.split()[1:3])


def group_of(line: str) -> str:
    """The group that a line's parameter moves in."""
    level, clock = line.split()[1:3]
    phase = clock.partition("+")[2]
    return f"{level}+{phase}" if phase else level


def members(lines: Mapping[str, str]) -> dict[str, set[str]]:
    """Parameters of each group that moves."""
    groups: dict[str, set[str]] = {}
    for name, line in lines.items():
        if "frozen" not in line:
            groups.setdefault(group_of(line), set()).add(name)
    return groups


def carried(facts: dict[str, Any], change: Change, now: Mapping[str, str]) -> dict[str, Any]:
    """A checkpoint's facts for the new levels: windows that end are closed, new groups count their members' updates."""
    then, windows, updates = facts["identity"], facts["windows"], dict(facts["updates"])
    tasks: dict[str, list[int]] = {}
    opened = {name: steps if name in change.kept else 0 for name, steps in windows["open"].items()}
    tokens = [{name: n if name in change.kept else 0 for name, n in each.items()} for each in windows["tokens"]]
    for group, names in members(now).items():
        olds = {group_of(then[name]) for name in names if name in then}
        known = [facts["tasks"][old] for old in olds if old in facts.get("tasks", {})]
        if known and len(known) == len(olds):  # of leaves that come together, what all of them have
            tasks[group] = [max(each[0] for each in known), min(each[1] for each in known), min(e[2] for e in known)]
        for key in (group, f"{group}/nested"):
            before = [updates.get(old + suffix, 0) for old in olds for suffix in ("", "/nested")]
            updates.setdefault(key, max(before, default=0))
    return {**facts, "tasks": tasks, "windows": {**windows, "open": opened, "tokens": tokens}, "updates": updates}


def dropped(facts: dict[str, Any], change: Change) -> list[str]:
    """Groups whose open windows end with the change."""
    return sorted(name for name, steps in facts["windows"]["open"].items() if steps and name not in change.kept)


def of_tasks(key: str) -> bool:
    """Whether a tensor of a checkpoint is what a level keeps of earlier tasks; it may be newly asked for."""
    return key.startswith(tuple(f"state.{name}" for name in (ANCHOR, IMPORTANCE, DIRECTION)))


def newly_kept(
    levels: Sequence[Level], now: Collection[str], there: Collection[str], parts: Mapping[str, tuple[str, int]]
) -> set[str]:
    """Levels whose switches ask for something of earlier tasks that the checkpoint holds of none of their leaves."""
    found = set()
    for level in levels:
        olds = [parts.get(name, (name, 0))[0] for name in now if level_of(name, levels) is level]
        kinds = {name.rstrip("0123456789") for name in state_names(level)}  # more places are no new switch
        if any(not any(f"state.{kind}/{old}" in there for old in olds) for kind in map(first_of, kinds)):
            found.add(level.name)
    return found


def first_of(kind: str) -> str:
    """The first tensor of a kind of state."""
    return f"{kind}0" if kind == DIRECTION else kind


def anchor_new(optimizer: Optimizer, there: Collection[str], parts: Mapping[str, tuple[str, int]]) -> None:
    """Anchors leaves that the checkpoint does not anchor where they are; call it once weights are loaded."""
    for mover in optimizer.movers.values():
        for fragment in (each for shard in mover.shards for each in optimizer.fragments(shard)):
            old = parts.get(fragment.leaf.name, (fragment.leaf.name, 0))[0]
            if ANCHOR in fragment.values and f"state.{ANCHOR}/{old}" not in there:
                fragment.values[ANCHOR].copy_(fragment.values["weight"])
                fragment.values[IMPORTANCE].fill_(1)


def begin_new(optimizer: Optimizer, new: frozenset[str], there: Collection[str]) -> None:
    """Makes the output projections of new parameters zero; a slow copy that was not there begins at its master."""
    for mover in optimizer.movers.values():
        for shard in mover.shards:
            for fragment in optimizer.fragments(shard):
                name, values = fragment.leaf.name, fragment.values
                if name in new and name.endswith(".down.weight"):
                    values["weight"].zero_()
                if SLOW in values and f"state.{SLOW}/{name}" not in there:
                    values[SLOW].copy_(values["weight"])
