"""What happens around ranks: doubles play them, Slurm is real."""

import json
import subprocess
import time

from tests.records import events
from tests.slurm.runs import PROGRAM
from tests.slurm.stories import Scene, story


@story
def failing_node(scene: Scene) -> None:
    """A node on which ranks are killed twice is left out of the third attempt."""
    scene.spare(drained=True)  # else the second attempt may come before the first one's nodes are free
    run = scene.acted("-9:0@1 -9:0@1 0:30", nodes=2)
    run.until(lambda: len(run.codes()) == 2, "two attempts")
    scene.spare(drained=False)
    assert run.ended()["JobState"] == "COMPLETED", run.told()
    first, second, third = (event["nodes"] for event in run.events("attempt"))
    assert first == second and first[1] not in third, run.told()
    assert [event["blamed"] for event in run.events("attempt ended")] == [[first[1]], [first[1]], []]
    assert f"requeued without {first[1]}" in run.out()


@story
def unproved_node(scene: Scene) -> None:
    """A node whose scratch is read-only is named before a rank starts, and left out at once."""
    first, second, third, bad = scene.nodes
    place = f"{scene.slurm.dir}/local/there"
    for name in scene.nodes:
        scene.slurm.node("exec", name, "mkdir", "-p", place)
    for name in (third, bad):
        scene.slurm.node("exec", name, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place)
    scratch = f"cluster.scratch={place}"
    run = scene.acted("0:30", scratch, without=(first, second), nodes=2)
    run.until(lambda: run.codes() == [69], "bad nodes")
    why = f"scratch ({place}): Read-only file system"
    assert run.events("attempt ended")[0]["reason"] == f"{third}: {why}; {bad}: {why}", run.told()
    assert "no node proved itself" in run.events("give up")[0]["reason"] and run.ended()["ExitCode"] == "93:0"
    scene.slurm.node("exec", third, "umount", place)
    scene.slurm.said("scontrol", "update", f"nodename={second}", "state=drain", "reason=test")
    run = scene.acted("0:30", scratch, without=(first,), nodes=2)
    run.until(lambda: run.codes()[-1:] == [69], "the bad node again")
    scene.slurm.said("scontrol", "update", f"nodename={second}", "state=resume")
    assert run.ended()["JobState"] == "COMPLETED", run.told()
    assert [event["nodes"] for event in run.events("attempt")][1:] == [[third, bad], [second, third]]


@story
def chain_past_a_bad_node(scene: Scene) -> None:
    """Jobs of a chain are not requeued: what waits of it does without a node that did not prove itself."""
    bad, good = scene.nodes[0], scene.nodes[1:2]
    place = f"{scene.slurm.dir}/local/other"
    for name in (bad, *good):
        scene.slurm.node("exec", name, "mkdir", "-p", place)
    scene.slurm.node("exec", bad, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place)
    away = (scene.nodes[2], scene.nodes[3])
    run = scene.acted("0:30", f"cluster.scratch={place}", "cluster.tasks=1", without=away, words=["--array", "3"])
    run.until(lambda: len(run.codes()) == 2, "two attempts")
    assert run.codes() == [69, 0] and "the next job of the chain goes on" in run.out(), run.told()
    assert [event["nodes"] for event in run.events("attempt")] == [[bad], good], run.told()
    assert run.events("attempt")[1]["job"] == f"{run.job}_2"


@story
def codes_that_are_not_requeued(scene: Scene) -> None:
    for code in (78, 93):
        run = scene.acted(f"{code}:5")
        facts = run.ended()
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", f"{code}:0", "0"), run.told()
        assert run.events("attempt ended")[-1]["reason"] == f"as asked: {code}:5"


@story
def asked_to_cancel(scene: Scene) -> None:
    """`nlscale cancel`: what runs saves and is not requeued, what waits leaves the queue; a second has nothing to do."""
    run = scene.acted("wait:5", words=["--array", "2"])
    run.until(lambda: "wait" in read(run.folder / "logs" / "1" / "rank-00000.log"), "a rank that waits")
    table = scene.slurm.said(*PROGRAM, "status", run.folder, "--json", scene.folder / "status.json")
    row = json.loads((scene.folder / "status.json").read_text())["rows"][0]
    assert (row["state"], row["checkpoint"], row["attempts"]) == ("running", 5, 1) and "on node" in row["what"], table
    second = refused(scene, run.overrides)
    assert f"belongs to job {run.job}_1 (running)" in second and "nlscale cancel" in second
    said = scene.slurm.said(*PROGRAM, "cancel", run.folder)
    assert f"job {run.job}_1 saves and ends" in said and "is cancelled" in said, said
    run.until(lambda: run.codes() == [75], "its end")
    assert "the job was cancelled: not requeued" in run.until(run.out, "its output")
    run.until(lambda: scene.slurm.job(f"{run.job}_1")["JobState"] == "FAILED", "the job's end")
    again = scene.slurm.tried(*PROGRAM, "cancel", run.folder)
    assert again.returncode == 78 and "no job of this run is in the queue" in again.stdout
    assert "saved" in scene.slurm.said(*PROGRAM, "status", run.folder)


def refused(scene: Scene, overrides: list[str]) -> str:
    """What a submission of the same run says."""
    done = scene.slurm.tried(*PROGRAM, "submit", "demo", *overrides, "--cluster", "cpu", "--nodes", "1")
    assert done.returncode == 78 and len(done.stdout.splitlines()) == 1, done.stdout
    return str(done.stdout)


def read(path) -> str:  # type: ignore[no-untyped-def]
    return path.read_text() if path.is_file() else ""


@story
def sweep(scene: Scene) -> None:
    """Two runs of one array, each in a folder of its own with its own rate; one is cancelled, and the other goes on."""
    run = scene.acted("wait:5 0:30", "optim.lr=1e-3,2e-3", words=["--array", "2"])
    folders = [run.folder.with_name(f"run-{place}") for place in (1, 2)]
    run.until(lambda: all("wait" in read(folder / "logs" / "1" / "rank-00000.log") for folder in folders), "both")
    for folder, lr in zip(folders, ("0.001", "0.002"), strict=True):
        config = (folder / "slurm" / "0001.yaml").read_text()
        assert f"  lr: {lr}\n" in config and f"  name: {folder.name}\n" in config
        assert list((folder / "slurm").glob(f"{run.job}_*.out"))
        facts = json.loads((folder / "slurm" / "0001.json").read_text())
        assert "torch" in facts["packages"] and "commit" in facts and facts["folder"] == str(folder)
    said = scene.slurm.said(*PROGRAM, "cancel", folders[0])
    assert said == f"job {run.job}_1 saves and ends", said
    run.until(lambda: ended(folders[0]), "the first's end")
    assert not ended(folders[1]) and "running" in scene.slurm.said(*PROGRAM, "status", folders[1])
    scene.slurm.said("scancel", "--signal=USR2", f"{run.job}_2")
    run.until(lambda: read(folders[1] / "events.jsonl").count('"attempt ended"') == 2, "the second's second life")
    assert "not requeued" in read(next((folders[0] / "slurm").glob("*.out")))
    assert "requeued" in read(next((folders[1] / "slurm").glob("*.out"))) and not run.folder.exists()


def ended(folder) -> bool:  # type: ignore[no-untyped-def]
    return '"attempt ended"' in read(folder / "events.jsonl")


@story
def after_another_job(scene: Scene) -> None:
    """afterok of a job that fails: never started, and gone from the queue; of one that ends well: started after it."""
    for command, state in (("exit 3", "CANCELLED"), ("sleep 2", "COMPLETED")):
        first = scene.slurm.said("sbatch", "--parsable", "-o", "/dev/null", "--wrap", command)
        run = scene.acted("0:30", f"run.name={state}", words=["--after", first])
        facts = run.ended()
        assert facts["JobState"] == state, facts
        if state == "COMPLETED":
            assert facts["StartTime"] >= scene.slurm.job(first)["EndTime"]
        else:
            assert not events(run.run, "attempt")


@story
def followed(scene: Scene) -> None:
    """`nlscale logs -f` gives labelled lines as they come, and ends with the run."""
    run = scene.acted("wait:5 0:30", nodes=2)
    command = [str(word) for word in (*PROGRAM, "logs", "-f", run.folder, "--rank", "all")]
    with subprocess.Popen(command, env=scene.slurm.env, stdout=subprocess.PIPE, text=True) as process:
        run.until(lambda: "wait" in read(run.folder / "logs" / "1" / "rank-00001.log"), "a rank that waits")
        time.sleep(1)
        scene.slurm.said("scancel", "--signal=USR2", run.job)
        run.ended()
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    for line in ("1/rank 0 | rank 0: wait:5", "1/rank 1 | rank 1: wait:5", "2/rank 1 | rank 1: 0:30", "| requeued"):
        assert any(line in each for each in said.splitlines()) or line == "| requeued", said
    assert f"job {run.job} | " in said and "requeued" in said
