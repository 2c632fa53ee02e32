"""Runs that a cluster interrupts, on a real one: each ends with the bits of the unbroken run, or with the code it should.

`pytest -s` prints the rows of the table in launch/README.md; STORIES=1 tells one at a time, for its figures.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from nlscale.config.read import dump
from nlscale.runtime.folder import Folder
from tests.corpus import small_run
from tests.records import events
from tests.slurm import acts
from tests.slurm.cluster import Cluster
from tests.slurm.runs import PROGRAM, Submitted, equal, unbroken
from tests.slurm.stories import STORIES, Scene, story

LAUNCH = Path(__file__).parents[2] / "launch" / "README.md"
FOUR = ["parallel.tensor=2"]  # two nodes of two ranks: TP2 x DP2
TWO = ["parallel.tensor=2", "cluster.tasks=1"]  # two nodes of one rank: TP2
LONG = "train.steps=3000"
LAST = "controller_killed"  # it forgets jobs that were submitted just before
pytestmark = pytest.mark.timeout(900)
assert acts  # its stories are told, too


@story
def time_limit(scene: Scene) -> None:
    run = scene.submit(*TWO, LONG, *scene.fault("sleep 0.2"))
    run.at_step(5)
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 45))  # within the lead; Slurm looks each 30 s
    scene.slurm.said("scontrol", "update", f"jobid={run.job}", f"EndTime={end}")
    run.until(lambda: run.codes() == [75], "saved on the signal")
    scene.slurm.said("scontrol", "update", f"jobid={run.job}", "TimeLimit=60")  # the next life's, which EndTime has cut
    (moment,) = (event["time"] for event in run.events("stop"))
    goes_on_as_unbroken(scene, run)
    scene.took("time limit, from the save", run.again_after(moment))


def goes_on_as_unbroken(scene: Scene, run: Submitted) -> None:
    """Waits for a second life's save, cancels the job, and leaves a step for the comparison with the unbroken run."""
    run.until(lambda: len(run.events("start")) == 2, "training again")
    since = run.events("start")[1]["step"]
    folder = Folder(run.folder)
    step = run.until(lambda: next((each for each in folder.steps() if each > since), 0), "a save of the second life")
    scene.slurm.said("scancel", run.job)
    run.ended()
    scene.whole[run.folder.parent.name] = (run, step)


@story
def network_cut(scene: Scene) -> None:
    """The cut node trains on and writes the shared folder, until another node has taken it over."""
    run = scene.submit("parallel.tensor=2", LONG, *scene.fault("sleep 0.3"), nodes=1)
    run.at_step(5)
    (node,) = run.events("attempt")[0]["nodes"]
    moment = time.time()
    scene.slurm.node("cut", node)
    try:
        run.until(lambda: len(run.events("start")) == 2, "training on another node")
        assert [event["host"] for event in run.events("start")] != [node, node]
        old = run.until(lambda: (run.folder / "logs" / "1" / "exit.json").is_file(), "the old writer's end", 60)
        assert old and '"code": 93' in (run.folder / "logs" / "1" / "exit.json").read_text()
        assert "this attempt writes nothing more" in (run.folder / "logs" / "1" / "exit.json").read_text()
        saved = [event for event in run.events("save") if event["host"] == node]
        assert saved[-1]["time"] < run.events("start")[1]["time"]
        goes_on_as_unbroken(scene, run)
    finally:
        scene.slurm.node("join", node)
    scene.took("network cut, split brain", run.again_after(moment))


@story
def to_its_end_and_requeued(scene: Scene) -> None:
    run = scene.submit(*FOUR)
    assert run.ended()["JobState"] == "COMPLETED" and equal(run.run, scene.whole["four"]), run.told()
    assert run.codes() == [0]
    moment = time.monotonic()
    scene.slurm.said("scontrol", "requeue", run.job)
    run.until(lambda: "the run is finished: step 30 of 30" in run.out(), "the finished run")
    facts = run.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert len(run.events("attempt")) == 1
    scene.took("requeue of a finished run, to its end", time.monotonic() - moment)


@story
def usr2(scene: Scene) -> None:
    run = scene.submit(*FOUR)
    run.at_step(5)
    moment = time.time()
    scene.slurm.said("scancel", "--signal=USR2", run.job)
    assert run.ended()["JobState"] == "COMPLETED" and equal(run.run, scene.whole["four"]), run.told()
    assert run.codes() == [75, 0] and run.events("stop")[0]["signal"] == "SIGUSR2"
    scene.took("scancel -s USR2", run.again_after(moment))


def preempted(scene: Scene, partition: str) -> Submitted:
    run = scene.submit(*TWO, f"cluster.partition={partition}", *scene.fault("sleep 0.1"))
    run.at_step(5)
    nodes, moment = run.events("attempt")[0]["nodes"], time.time()
    words = [
        "-p",
        "high",
        f"--nodelist={','.join(nodes)}",
        "-N2",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 1",
    ]
    scene.slurm.ended(scene.slurm.said("sbatch", "--parsable", *words))
    assert run.ended()["JobState"] == "COMPLETED" and equal(run.run, scene.whole["two"]), run.told()
    first, last = run.codes()  # the job's shell may be killed (KillWait) before it has said its word
    assert last == 0 and first in (75, None) and scene.slurm.job(run.job)["Restarts"] == "1", run.told()
    scene.took(f"preemption, GraceTime {10 if partition == 'grace' else 0}", run.again_after(moment))
    return run


@story
def preemption_at_once(scene: Scene) -> None:
    preempted(scene, "low")


@story
def preemption_with_grace(scene: Scene) -> None:
    run = preempted(scene, "grace")
    assert "requeued" in run.out()


def powered_off(scene: Scene, victim: int) -> None:
    run = scene.submit(*TWO, *scene.fault("sleep 0.1"))
    run.at_step(12)
    nodes, moment = run.events("attempt")[0]["nodes"], time.time()
    scene.slurm.node("poweroff", nodes[victim])
    scene.slurm.said("scontrol", "update", f"nodename={nodes[victim]}", "state=down", "reason=test")
    try:
        assert run.ended()["JobState"] == "COMPLETED" and equal(run.run, scene.whole["two"]), run.told()
    finally:
        scene.slurm.node("start", nodes[victim])
    first, *between, last = run.events("attempt")  # between: Slurm may give the dead node once more before it knows
    assert first["nodes"] == nodes and nodes[victim] not in last["nodes"] and len(between) <= 1, run.told()
    assert run.events("attempt ended")[0]["blamed"] == [nodes[victim]], run.told()
    scene.took(f"power off, {'other node' if victim else 'batch host'}", run.again_after(moment))


@story
def batch_host_powered_off(scene: Scene) -> None:
    powered_off(scene, 0)


@story
def other_node_powered_off(scene: Scene) -> None:
    powered_off(scene, 1)


@story
def controller_killed(scene: Scene) -> None:
    run = scene.submit(*TWO, *scene.fault("sleep 0.2"))
    run.at_step(8)
    scene.slurm.controller("kill")
    time.sleep(2)
    scene.slurm.controller("start")
    scene.slurm.wait(lambda: "is UP" in scene.slurm.tried("scontrol", "ping").stdout, "the controller", 30)
    assert run.ended()["JobState"] == "COMPLETED" and equal(run.run, scene.whole["two"]), run.told()
    assert run.codes() == [0]


@story
def crash_loop(scene: Scene) -> None:
    run = scene.submit("cluster.tasks=1", *scene.fault("raise 7"), nodes=1)
    facts = run.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "93:0", "2"), run.told()
    assert run.codes() == [1, 1, 1] and "a fault at step 7" in run.events("attempt ended")[0]["reason"]
    assert "3 crashes in a row" in run.events("give up")[0]["reason"]


@story
def chain(scene: Scene) -> None:
    """Two jobs of one run, one after the other: the second goes on where a signal stopped the first."""
    run = scene.submit("cluster.tasks=1", *scene.fault("sleep 0.1"), nodes=1, words=["--array", "2"])
    run.at_step(5)
    scene.slurm.said("scancel", "--signal=USR2", f"{run.job}_1")
    run.until(lambda: len(run.codes()) == 2, "both jobs of the chain")
    assert run.codes() == [75, 0] and equal(run.run, scene.whole["one"]), run.told()
    assert [event["job"] for event in run.events("attempt")] == [f"{run.job}_1", f"{run.job}_2"]
    assert scene.slurm.job(f"{run.job}_1")["Restarts"] == "0"
    later = scene.submit("cluster.tasks=1", nodes=1, words=["--after", run.job])
    assert later.ended()["JobState"] == "COMPLETED" and len(later.events("attempt")) == 2


@story
def plain_srun(scene: Scene) -> None:
    """Ranks take their places from srun alone, without a job script of ours, by the words of the documentation."""
    run = small_run(
        scene.data, scene.folder / "run", "parallel.tensor=2", "cluster.threads=1", "checkpoint.interval=10"
    )
    (scene.folder / "config.yaml").write_text(dump(run))
    (said,) = (line.split("  #")[0] for line in LAUNCH.read_text().splitlines() if line.startswith("srun "))
    fill = {"8": "1", "nlscale": PROGRAM, "RECIPE": [scene.folder / "config.yaml"]}
    first, *words = (part for word in said.split() for part in fill.get(word, [word]))
    where = ["-N2", f"--nodelist={','.join(scene.nodes[:2])}", "--exclusive"]
    environment = scene.slurm.env | {"MASTER_ADDR": scene.nodes[0], "TMPDIR": f"{scene.slurm.dir}/local"}
    said = scene.slurm.said(first, *where, *words, env=environment)
    assert "2 ranks, 1 replica, " in said and equal(run, scene.whole["two"]), said
    assert [event["code"] for event in events(run, "attempt ended")] == [0]


@story
def cancelled(scene: Scene) -> None:
    """scancel by a person: saved, as there is time, and not requeued."""
    run = scene.submit("cluster.tasks=1", LONG, *scene.fault("sleep 0.1"), nodes=1)
    run.at_step(5)
    scene.slurm.said("scancel", run.job)
    run.until(lambda: run.codes() == [75], "its save")
    facts = run.ended()
    (stop,) = run.events("stop")
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0") and "not requeued" in run.out(), run.told()
    assert stop["signal"] == "SIGTERM" and Folder(run.folder).newest == stop["step"]


@pytest.fixture(scope="module")
def told(
    prepared: str, tmp_path_factory: pytest.TempPathFactory, machine: Cluster, request: pytest.FixtureRequest
) -> Iterator[dict[str, Any]]:
    """Every story that was asked for, under way."""
    root = tmp_path_factory.mktemp("stories")
    layouts = {"four": (4, "parallel.tensor=2"), "two": (2, "parallel.tensor=2"), "one": (1, "parallel.tensor=1")}
    whole = {name: unbroken(prepared, root / f"whole-{name}", *layout) for name, layout in layouts.items()}
    wanted = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    places: SimpleQueue[list[str]] = SimpleQueue()
    for first in range(0, len(machine.nodes), 4):
        places.put(machine.nodes[first : first + 4])

    def tell(name: str) -> None:
        (root / name).mkdir()
        nodes = places.get()
        try:
            STORIES[name](Scene(machine, prepared, root / name, whole, nodes))
        finally:
            places.put(nodes)

    with ThreadPoolExecutor(int(os.environ.get("STORIES", "4"))) as pool:
        found = {name: pool.submit(tell, name) for name in STORIES if name in wanted and name != LAST}
        if LAST in wanted:
            wait(found.values())
            found[LAST] = pool.submit(tell, LAST)
        yield {**found, "whole": whole}
    machine.reset()


@pytest.mark.parametrize("name", STORIES)
def test_story(name: str, told: dict[str, Any], prepared: str, tmp_path: Path) -> None:
    assert told[name].result() is None
    if name in told["whole"]:
        run, step = told["whole"][name]
        other = unbroken(prepared, tmp_path / "whole", 2, "parallel.tensor=2", LONG, f"train.stop_at={step}")
        assert equal(run.run, other, step)
