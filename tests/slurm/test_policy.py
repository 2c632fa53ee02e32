"""What follows an attempt, as interfaces' table of exit codes says; and who is to blame, by srun's words or a rank's."""

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from nlscale_launch.attempt import Submission, cause, free_port
from nlscale_launch.policy import BAD_NODE, LOST, Attempt, attempts_of, left_out, verdict
from nlscale_launch.preflight import Judge, faults, hand_in, judged, node_facts
from nlscale_launch.slurm import first, job

VERSIONS = {"python": "3.11.7", "torch": "2.11"}


def attempts(*ended: tuple[int, int]) -> list[Attempt]:
    """From (code, step) pairs."""
    return [Attempt(place + 1, code, step) for place, (code, step) in enumerate(ended)]


@pytest.mark.parametrize(
    ("ended", "what", "code"),
    [
        ([(0, 30)], "end", 0),
        ([(78, 0)], "end", 78),
        ([(93, 10)], "end", 93),
        ([(75, 10)], "again", 75),
        ([(75, 10), (75, 10), (75, 10), (75, 10)], "again", 75),
        ([(BAD_NODE, 0), (BAD_NODE, 0), (BAD_NODE, 0)], "again", BAD_NODE),
        ([(1, 0)], "again", 1),
        ([(1, 0), (137, 0)], "again", 137),
        ([(1, 0), (137, 0), (70, 0)], "give up", 93),
        ([(1, 0), (1, 0), (1, 10)], "again", 1),
        ([(1, 10), (1, 20), (1, 30), (1, 40)], "again", 1),
        ([(1, 0), (1, 10), (1, 10), (1, 10)], "give up", 93),
        ([(1, 10), (75, 10), (1, 10), (LOST, 10), (1, 10)], "give up", 93),
        ([(1, 10), (1, 10), (LOST, 10)], "again", LOST),
        ([(LOST, 0)] * 7, "again", LOST),
    ],
)
def test_what_follows(ended: list[tuple[int, int]], what: str, code: int) -> None:
    given = verdict(attempts(*ended), 3)
    assert (given.what, given.code) == (what, code)
    assert bool(given.why) == (what == "give up")


def test_a_job_whose_only_nodes_never_prove_themselves_is_given_up() -> None:
    """Slurm has no others to give; while it may have some, nodes are left out one after the other."""
    one_after_another = [Attempt(place, BAD_NODE, 0, (f"node{place}",)) for place in range(1, 6)]
    assert verdict(one_after_another, 3).what == "again"
    again = [*one_after_another, *(Attempt(place, BAD_NODE, 0, ("node2",)) for place in (6, 7))]
    assert verdict(again, 3).what == "again"
    given = verdict([*again, Attempt(8, BAD_NODE, 0, ("node1", "node2"))], 3)
    assert (given.what, given.code) == ("give up", 93) and "node1, node2 did not prove themselves 3 times" in given.why
    assert verdict([*again, Attempt(8, 75, 10), Attempt(9, BAD_NODE, 10, ("node2",))], 3).what == "again"


def test_nodes_are_left_out_after_so_many_failures_and_at_once_if_unproved() -> None:
    history = [
        Attempt(1, 1, 0, ("node1",)),
        Attempt(2, LOST, 0, ("node2",)),
        Attempt(3, 137, 10, ("node1",)),
        Attempt(4, BAD_NODE, 10, ("node5",)),
    ]
    assert left_out(history[:2], 2) == []
    assert left_out(history, 2) == ["node1", "node5"]


def test_attempts_are_counted_since_the_last_submission_and_one_without_an_end_is_lost() -> None:
    def event(kind: str, **facts: Any) -> dict[str, Any]:
        return {"event": kind, "step": 4, "blamed": [], **facts}

    events = [
        event("submit"),
        event("attempt", attempt=1),
        event("attempt ended", attempt=1, code=1),
        event("submit"),
        event("attempt", attempt=2),
        event("attempt", attempt=3),
        event("attempt ended", attempt=3, code=None, blamed=["node2"]),
    ]
    assert attempts_of(events) == [Attempt(2, LOST, 4), Attempt(3, LOST, 4, ("node2",))]
    jobs = ["12_1", "12_1", "12_1", "13", "12_2", "13", "13"]
    told = [each | {"job": job} for each, job in zip(events, jobs, strict=True)]
    assert [each.number for each in attempts_of(told, "12_2")] == [1, 2]
    assert [each.number for each in attempts_of(told, "13")] == [3]


SAID = {
    "a rank killed": (
        "srun: error: node2: task 1: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=5.1\n"
        "srun: error: node1: task 0: Exited with exit code 1\n",
        137,
        (137, ["node2"]),
    ),
    "several ranks": ("srun: error: node7: tasks 8-11,14: Segmentation fault (core dumped)\n", 139, (139, ["node7"])),
    "a node gone": (
        "srun: error: Node failure on node3\nsrun: error: node1: task 0: Terminated\n",
        143,
        (143, ["node3"]),
    ),
    "an exception": ("srun: error: node4: task 3: Exited with exit code 1\n", 1, (1, [])),
    "others that were ended": (
        "srun: error: node4: task 3: Exited with exit code 1\nsrun: launch/slurm: _step_signal: Terminating StepId=5.1\n"
        "srun: error: node1: tasks 0-2: Killed\n",
        137,
        (137, []),
    ),
    "a signal that came early": ("srun: error: node1: tasks 0-7: User defined signal 2\n", 140, (75, [])),
    "a crash whose peers were ended": (
        "srun: error: node1: task 0: Exited with exit code 1\nsrun: error: node2: task 1: Terminated\n",
        143,
        (143, []),
    ),
    "one that a signal reached early, and its peers": (
        "srun: error: node2: task 3: User defined signal 2\nsrun: error: node1: task 0: Exited with exit code 1\n",
        140,
        (75, []),
    ),
    "ranks that end themselves": ("srun: error: node1: tasks 0-1: Aborted (core dumped)\n", 134, (134, [])),
    "a task that could not be launched": (
        "srun: error: Task launch for StepId=5.1 failed on node node3: Invalid job credential\n",
        1,
        (1, ["node3"]),
    ),
    "nothing said": ("", 1, (1, [])),
}


@pytest.mark.parametrize("kind", SAID)
def test_sruns_words_name_the_node(kind: str, tmp_path: Path) -> None:
    words, code, wanted = SAID[kind]
    (tmp_path / "srun.log").write_text(words)
    given, _, blamed = cause(tmp_path, code, False)
    assert (given, blamed) == wanted


def test_the_rank_that_ended_first_is_believed_about_its_reason_but_not_over_a_killed_one(tmp_path: Path) -> None:
    said = {"code": 75, "rank": 0, "host": "node1", "message": "saved at step 7 on a signal", "hosts": ["node1"]}
    (tmp_path / "exit.json").write_text(json.dumps(said))
    assert cause(tmp_path, 143, False) == (75, "saved at step 7 on a signal", [])
    gone = said | {"code": 1, "message": "RuntimeError: peer gone", "hosts": []}
    (tmp_path / "exit.json").write_text(json.dumps(gone))
    assert cause(tmp_path, 1, False) == (1, "rank 0 (node1): RuntimeError: peer gone", [])
    (tmp_path / "srun.log").write_text("srun: error: node2: task 1: Bus error\n")
    assert cause(tmp_path, 135, False) == (135, "node2: Bus error", ["node2"])
    (tmp_path / "exit.json").write_text(
        json.dumps(gone | {"code": 70, "message": "no sign of rank 5", "hosts": ["node3"]})
    )
    assert cause(tmp_path, 135, False) == (70, "rank 0 (node1): no sign of rank 5", ["node3"])
    (tmp_path / "preflight.json").write_text(json.dumps({"nodes": {}, "bad": {"node9": ["7 of 8 GPUs answer"]}}))
    assert cause(tmp_path, BAD_NODE, False) == (BAD_NODE, "node9: 7 of 8 GPUs answer", ["node9"])


def test_sruns_zero_is_no_proof_that_a_run_is_finished(tmp_path: Path) -> None:
    """It says 0, too, where it was ended itself and its ranks were not through."""
    assert cause(tmp_path, 0, True) == (0, "", [])
    assert cause(tmp_path, 0, False) == (1, "ranks ended before the run did", [])
    (tmp_path / "srun.log").write_text("srun: error: Timed out waiting for job step to complete\n")
    assert cause(tmp_path, 0, False) == (75, "srun left its ranks", [])
    said = {"code": 75, "rank": 0, "host": "node1", "message": "saved at step 7 on a signal", "hosts": []}
    (tmp_path / "exit.json").write_text(json.dumps(said))
    assert cause(tmp_path, 0, False) == (75, "saved at step 7 on a signal", [])


def submission(folder: Path, **more: Any) -> Submission:
    plain = {"steps": 1, "gpus": 0, "attempts": 3, "failures": 2, "least_free": 0.0, "gather": 2.0}
    more = {
        **plain,
        "least_gpu_memory": 0.0,
        "least_write": 0.0,
        "skew": 2.0,
        "scratch": str(folder),
        "folder": str(folder),
        **more,
    }
    return Submission(**more)


def gathered(tmp_path: Path, *clocks: float, token: str = "t", monkeypatch: Any = None) -> dict[str, dict[str, Any]]:
    """Facts of nodes that hand them in over TCP, with clocks that are off by so much."""
    asked, port = submission(tmp_path), free_port(7)
    judge = Judge(port, "t")
    for place, skew in enumerate(clocks):
        facts = node_facts(asked) | {"node": f"node{place + 2}"}
        monkeypatch.setattr("nlscale_launch.preflight.time.time", shifted(skew))
        hand_in(facts, "127.0.0.1", port, token, 2.0)
    return judge.wait([f"node{place + 2}" for place in range(len(clocks))], 2.0)


def shifted(skew: float) -> Any:
    """A clock that is off, but for the judge's own threads."""
    import time

    main, plain = threading.current_thread(), time.time
    return lambda: plain() + (skew if threading.current_thread() is main else 0.0)


def test_clocks_that_differ_are_found_and_their_node_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        found = gathered(tmp_path, 0.0, -30.0, monkeypatch=patched)
    assert abs(found["node2"]["skew"]) < 0.5 and abs(found["node3"]["skew"] + 30) < 0.5
    bad = judged(found, ["node2", "node3", "node4"], submission(tmp_path))
    assert bad["node3"] == ["its clock is -30.0 s off the others'"] and set(bad) == {"node3", "node4"}
    assert bad["node4"] == ["was not heard of within 2 s"]


def test_a_first_node_that_is_off_is_named_and_not_all_others(tmp_path: Path) -> None:
    """Its clock, against which all are compared; its network, through which all are heard."""
    good: dict[str, Any] = {"gpus": [], "disks": {}, "versions": VERSIONS}
    nodes = [f"node{place}" for place in range(1, 6)]
    clocks = {node: good | {"skew": 0.0 if node == "node1" else 61.0} for node in nodes}
    assert judged(clocks, nodes, submission(tmp_path)) == {"node1": ["its clock is -61.0 s off the others'"]}
    unheard = judged({"node1": good, "node2": good}, nodes, submission(tmp_path))
    assert unheard == {"node1": ["3 of 5 nodes were not heard of within 2 s"]}


def test_a_node_lost_again_and_again_without_progress_ends_the_run() -> None:
    lost = [Attempt(place, LOST, 10, (f"node{place}",)) for place in (1, 2, 3)]
    assert verdict(lost, 3).what == "give up" and verdict(lost[:2], 3).what == "again"


def test_who_does_not_know_the_token_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises((StopIteration, OSError)):
        gathered(tmp_path, 0.0, token="guessed", monkeypatch=patched)


def test_a_port_that_is_taken_is_passed_over() -> None:
    first = free_port(3)
    with socket.socket() as holder:
        holder.bind(("", first))
        holder.listen()
        assert free_port(3) != first
    assert free_port(3) == first


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"gpus": [79.6] * 7}, "7 of 8 GPUs answer"),
        ({"gpus": [79.6] * 7 + [39.6]}, "a GPU has 40 GiB, 79.0 are asked for"),
        ({"disks": {"scratch": {"path": "/s", "free": 0.2, "speed": 9.0}}}, "scratch (/s) has 0.20 GiB free of 1"),
        (
            {"disks": {"scratch": {"path": "/s", "error": "Read-only file system"}}},
            "scratch (/s): Read-only file system",
        ),
        (
            {"disks": {"scratch": {"path": "/s", "free": 9.0, "speed": 0.3}}},
            "scratch (/s) takes 0.30 MiB/s, 5 are asked for",
        ),
        ({"versions": VERSIONS | {"torch": "2.10"}}, "torch 2.10, elsewhere 2.11"),
        ({"versions": {"python": "3.11.7"}}, "torch none, elsewhere 2.11"),
        ({"skew": 4.5}, "its clock is +4.5 s off the others'"),
        ({}, None),
    ],
)
def test_what_makes_a_node_bad(facts: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    good: dict[str, Any] = {"node": "n", "gpus": [79.6] * 8, "disks": {}, "versions": VERSIONS}
    asked = submission(tmp_path, gpus=8, least_gpu_memory=79.0, least_free=1.0, least_write=5.0)
    assert faults(good | facts, asked, VERSIONS) == ([words] if words else [])


def test_squeues_json_of_old_and_new_versions() -> None:
    """22.05 writes plain numbers; from 23.02 on, numbers that may be unset and lists of states."""
    old = {"job_id": 14, "array_job_id": 12, "array_task_id": 2, "name": "n", "job_state": "RUNNING", "nodes": "node1"}
    new = old | {"job_id": {"set": True, "infinite": False, "number": 14}, "job_state": ["RUNNING"]}
    new |= {"array_job_id": {"set": True, "infinite": False, "number": 12}}
    new |= {"array_task_id": {"set": True, "infinite": False, "number": 2}}
    assert job(old) == job(new) and job(old).number == "12_2" and job(old).active
    waiting = old | {"array_task_id": None, "array_task_string": "3-9", "job_state": "PENDING", "nodes": ""}
    assert job(waiting).number == "12_[3-9]"
    alone = {"job_id": 7, "array_job_id": {"set": True, "infinite": False, "number": 0}, "job_state": "COMPLETED"}
    assert job(alone).number == "7" and not job(alone).active


def test_slurms_programs_without_a_cluster_are_one_short_sentence() -> None:
    """As squeue 22.05 says it where no file and no server tells of a controller."""
    said = "squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
    said += "squeue: error: fetch_config: DNS SRV lookup failed\nsqueue: fatal: Could not establish a configuration source\n"
    assert first(said) == "Slurm's programs are here, and no configuration of a cluster; SLURM_CONF would name its file"
    assert first("sbatch: error: Batch job submission failed: Invalid account") == (
        "Batch job submission failed: Invalid account"
    )
