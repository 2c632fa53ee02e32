"""A checked checkpoint, applied to a run's state: levels and data may have changed, if the run asks for it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nlscale.config.errors import UserError, require
from nlscale.config.mixers import network_of
from nlscale.data.card import TOKENISER
from nlscale.runtime.folder import STATE
from nlscale.runtime.log import Journal
from nlscale.train.continual import Change, anchor_new, begin_new, carried, compare, dropped, newly_kept, of_tasks
from nlscale.train.memories import check_memories, memories
from nlscale.train.pieces import load, stored
from nlscale.train.split import divided, parts_of, redirected
from nlscale.train.state import TrainState
from nlscale.train.windows import load_windows

ORIGIN = "origin"  # what a checkpoint says that no run has written: where its weights came from


def apply(state: TrainState, path: Path, journal: Journal, rows: bool = True) -> None:
    """Takes over a checked checkpoint; `rows`: and its place in the data. A collective.

    Raises UserError for a checkpoint of another model or dataset, unless the run asks for the change.
    """
    facts = json.loads((path / STATE).read_text())
    check_network(network_of(state.run.model), facts.get("network", {}), path)
    now = state.identity()
    parts = parts_of(now, facts["identity"], state.run.levels)
    facts["identity"] = divided(facts["identity"], now, parts)
    change = compare(now, facts["identity"], path, state.run.checkpoint.levels == "change")
    moved_on = facts["data"] != state.fingerprints
    if moved_on and state.run.checkpoint.data != "change":
        raise UserError(
            f"{path} was trained on another dataset; give the old data.path, another run.name, or checkpoint.data=change "
            "to go on with the new one:\n" + "\n".join(differences(facts.get("datasets", []), state.datasets()))
        )
    check_tokeniser({card.tokeniser_digest for card in state.cards}, facts.get("datasets", []), path)
    pieces, there = state.shards() | memories(state), stored(path)
    partial = bool(change) or ORIGIN in facts  # of what came from elsewhere there are weights alone
    check_memories({key: each for key, each in pieces.items() if not partial or key in there}, there)
    began = newly_kept(state.run.levels, now, there, parts)
    pieces = redirected(pieces, parts, there)
    load({key: each for key, each in pieces.items() if key in there or not (partial or of_tasks(key))}, path)
    if change:
        report(change, facts, journal)
        facts = carried(facts, change, now)
        begin_new(state.optimizer, change.new, there)
    anchor_new(state.optimizer, there, parts)
    places: dict[str, Any] = {"loader": None} if moved_on or not rows else {}
    places |= {} if rows else {"replay": None}
    state.apply_facts(facts | places)
    state.optimizer.publish()
    load_windows(state, facts["windows"], path)
    journal.event("restore", state.step, checkpoint=path.name, layout=facts["layout"])
    kept = state.optimizer.tasks.end([level.name for level in state.run.levels if moved_on or level.name in began])
    if moved_on:
        journal.event("data change", state.step, then=facts["data"], now=state.fingerprints)
    if moved_on or kept:
        what = "the data changes" if moved_on else "a task ends"
        journal.say(f"{what} at step {state.step}; kept of the task before: {', '.join(kept) or 'nothing'}")


def check_network(now: Mapping[str, Any], then: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where a checkpoint's tensors, shaped like this run's, are of a network that computes otherwise.

    A setting that a checkpoint says nothing of is not compared.
    """
    others = {key: then[key] for key in now if then.get(key, now[key]) != now[key]}
    if others:
        was = ", ".join(f"{key}={value}" for key, value in others.items())
        here = ", ".join(f"{key}={now[key]}" for key in others)
        raise UserError(f"{path} holds another network: {was}, here {here}; {was} would work, or another run.name")


def report(change: Change, facts: dict[str, Any], journal: Journal) -> None:
    """Says what a change of levels means."""
    moved, gone = sorted(set(change.moved.values())), dropped(facts, change)
    journal.event("levels change", facts["step"], moved=moved, new=sorted(change.new), windows_dropped=gone)
    windows = f"open windows of {', '.join(gone)} are dropped" if gone else "no open window is dropped"
    parts = [f"{len(change.moved)} parameters move otherwise ({'; '.join(moved)})"] if moved else []
    parts += [f"{len(change.new)} parameters are new"] if change.new else []
    journal.say(f"levels change at step {facts['step']}: {', '.join(parts)}; {windows}")


def check_tokeniser(now: set[str], then: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Raises UserError where the checkpoint's data was made with another tokeniser: its tokens would mean other words."""
    known = {each["tokeniser_digest"] for each in then}
    name, own = then[0]["tokeniser"] if then else "", path / TOKENISER
    require(
        not known or known == now,
        f"{path} was trained on tokens of another tokeniser ({name}), whose numbers would mean other words here; "
        f"`nlscale data prepare` with --tokeniser {own if own.is_file() else name} makes data for it",
    )


def differences(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    """What differs between two lists of datasets' cards, a line each."""
    nothing: dict[str, Any] = {}
    for place, (old, new) in enumerate(zip_longest(then, now, fillvalue=nothing)):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield f"  dataset {place + 1}: {name} {old.get(name, 'none')} -> {new.get(name, 'none')}"
