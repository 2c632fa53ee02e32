"""`nlscale submit`, `status`, `logs` and `cancel`: runs on a cluster."""

import argparse
import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nlscale_launch import logs, slurm, status
from nlscale_launch.script import Request
from nlscale_launch.submit import Plan, named, plan, spread, submit, test_only

from nlscale.config.errors import UserError, require
from nlscale.config.read import shipped
from nlscale.verbs.common import add, add_recipe, existing, resolve


def verbs(parent: Any) -> None:
    """Adds them."""
    made = add(parent, "submit", submit_run, "submit a run to Slurm, which trains it to its end over restarts")
    add_recipe(made)
    made.add_argument("--cluster", required=True, help=f"one of {', '.join(shipped('cluster'))}, or a YAML file")
    made.add_argument("--nodes", type=int, required=True, help="machines that the job asks for")
    made.add_argument("--dry-run", action="store_true", help="print the job script and write nothing")
    made.add_argument("--test-only", action="store_true", help="ask Slurm whether and when it would start")
    made.add_argument(
        "--array",
        type=int,
        default=0,
        metavar="K",
        help="K jobs: a sweep where an override lists K values (optim.lr=1e-3,3e-4), else one after another",
    )
    made.add_argument("--after", default="", metavar="JOB", help="start after this job")
    made = add(parent, "status", show, "state, step, loss, speed, checkpoints, attempts and goodput of runs")
    made.add_argument("run", nargs="?", metavar="RUN", help="unset: all in runs/")
    made.add_argument("--json", help="also write the table to this file")
    made = add(parent, "logs", tell, "what a run's job and ranks say")
    made.add_argument("run", metavar="RUN")
    made.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    made.add_argument("--rank", default="0", help="of which rank; all: of every rank")
    made.add_argument("--attempt", type=int, help="of which start; unset: the newest")
    made = add(parent, "cancel", end, "end a run: it saves first")
    made.add_argument("run", metavar="RUN")
    made.add_argument("--now", action="store_true", help="do not wait for a save")


def submit_run(options: argparse.Namespace) -> None:
    """`nlscale submit`."""
    for name in ("nodes", "array"):
        given = getattr(options, name)
        require(given > 0 or (name == "array" and given == 0), f"--{name} {given} must be at least 1")
    require(not options.after or options.after.replace("_", "").isdigit(), f"--after {options.after}: a job's number")
    wanted = planned(options)
    if options.dry_run:
        print(wanted.script, end="")
        return
    if options.test_only:
        fits, said = test_only(wanted)
        require(fits, f"Slurm refuses the job: {said}")
        print(said)
        return
    number = submit(wanted)
    folder = wanted.folder.path
    print(f"job          {number}  ({len(wanted.runs)} runs)" if wanted.sweep else f"job          {number}")
    print(f"run folder   {folder}")
    print(f"job script   {folder}/slurm/{wanted.number}.sbatch")
    name = wanted.runs[0].run.name if folder.parent == Path("runs").absolute() else str(folder)
    print(f"look         nlscale status {name}; nlscale logs -f {name}")


def planned(options: argparse.Namespace) -> Plan:
    """The submission that was asked for."""
    said = [f"use.cluster={options.cluster}", *options.overrides]
    each = spread(said, options.array) if options.array else [said]
    runs = [resolve(options.recipe, overrides) for overrides in each]
    if len(runs) > 1:
        runs = [named(run, place + 1) for place, run in enumerate(runs)]
    return plan(runs, Request(options.nodes, options.array, options.after))


def show(options: argparse.Namespace) -> None:
    """`nlscale status`."""
    folders = [existing(options.run)] if options.run else status.every(Path("runs"))
    require(bool(folders), "no run: runs/ holds none")
    found = status.rows(folders)
    print(status.table(found))
    if options.run and found[0].ledger:
        print(f"\n{status.spent(found[0].ledger)}")
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": [asdict(each) for each in found]}, indent=1) + "\n")


def tell(options: argparse.Namespace) -> None:
    """`nlscale logs`."""
    folder = existing(options.run)
    if options.rank != "all" and not options.rank.isdigit():
        raise UserError(f"--rank {options.rank}: a number, or all")
    follower = logs.Follower(folder, options.rank, options.attempt)
    states = {state.lower() for state in slurm.ACTIVE} | {"no answer"}
    going_on = states if options.follow else set[str]()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        for line in logs.follow(follower, lambda: options.follow and status.rows([folder])[0].state in going_on):
            print(line, flush=True)
    found = [label for label, _ in follower.sources() if "rank" in label]
    require(bool(found) or options.follow, f"{folder.path}: no log of rank {options.rank} yet, or in that attempt")


def end(options: argparse.Namespace) -> None:
    """`nlscale cancel`."""
    print(status.cancel(existing(options.run), options.now))
