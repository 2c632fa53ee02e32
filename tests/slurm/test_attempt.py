"""Both ends of an attempt where Slurm says or does what a test cluster seldom does; Slurm's words are put in its mouth."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from nlscale_launch import attempt, slurm
from nlscale_launch.attempt import Submission, begin, end
from nlscale_launch.policy import followed

from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.holder import Hold, this_process
from nlscale.runtime.log import Journal
from tests.slurm.test_policy import submission


@dataclass
class Said:
    """What Slurm says, and what it was asked for."""

    standing: tuple[str, int] = ("goes on", 0)
    requeues: bool = True
    gone: list[str] = field(default_factory=list)
    asked: list[tuple[str, Any]] = field(default_factory=list)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Said]:
    given = Said()

    def requeue(number: str, without: list[str]) -> bool:
        given.asked.append((number, list(without)))
        return given.requeues

    monkeypatch.setattr(slurm, "standing", lambda number, seconds=None: given.standing)
    monkeypatch.setattr(slurm, "requeue", requeue)
    monkeypatch.setattr(slurm, "gone", lambda nodes, since: given.gone)
    monkeypatch.setattr(slurm, "exclude", lambda number, without: given.asked.append((f"exclude {number}", without)))
    monkeypatch.setattr(attempt, "survive", lambda: None)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("NLSCALE_NODES", "node1,node2")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "slurm").mkdir()
    yield given


def saved(folder: Path, step: int) -> None:
    target = Folder(folder).checkpoint(step)
    target.mkdir(parents=True)
    (target / "manifest.json").write_text("{}")


def opened(asked: Submission, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """Begins an attempt; its logs."""
    assert begin(asked) == 0
    logs, port, token = capsys.readouterr().out.split()
    assert 20000 <= int(port) < 32000 and len(token) == 32
    monkeypatch.setenv("NLSCALE_LOGS", logs)
    return Path(logs)


def kinds(folder: Path) -> list[str]:
    return [event["event"] for event in read_lines(Folder(folder).events)]


def test_a_finished_run_and_a_cancelled_job_start_nothing(
    said: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = submission(tmp_path, steps=30)
    (tmp_path / "slurm" / "cancel-12").touch()
    assert begin(asked) == 0 and capsys.readouterr().out == ""
    (tmp_path / "slurm" / "cancel-12").unlink()
    saved(tmp_path, 30)
    assert begin(asked) == 0 and capsys.readouterr().out == "" and not kinds(tmp_path)


def test_the_attempt_that_ended_is_judged_and_not_another_that_was_refused_meanwhile(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody starts the same run by hand, and is refused with 78, while the job trains."""
    asked = submission(tmp_path, steps=30)
    opened(asked, monkeypatch, capsys)
    journal = Journal(Folder(tmp_path), True)
    journal.event("attempt", 0, attempt=2, job="", nodes=["login"])
    journal.event("attempt ended", 0, attempt=2, job="", code=78, reason="is held", blamed=[])
    assert end(asked, 75) == 75 and said.asked == [("12", [])]


@pytest.mark.parametrize(
    ("standing", "words"),
    [
        (("goes on", 1), "Slurm has requeued the job"),
        (("over", 0), "the job was cancelled"),
        (("", 0), "Slurm did not requeue it"),
        (("time limit", 0), "requeued"),
    ],
)
def test_what_slurm_says_of_the_job_decides(
    standing: tuple[str, int],
    words: str,
    said: Said,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, said.standing = submission(tmp_path, steps=30), standing
    opened(asked, monkeypatch, capsys)
    assert end(asked, 75) == 75
    assert words in capsys.readouterr().err and bool(said.asked) == (words == "requeued")


def test_an_attempt_that_was_followed_leaves_its_successor_alone(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A split brain's old half, which gets to its end after all."""
    asked = submission(tmp_path, steps=30)
    first = opened(asked, monkeypatch, capsys)
    opened(asked, monkeypatch, capsys)
    monkeypatch.setenv("NLSCALE_LOGS", str(first))
    assert end(asked, 75) == 75 and not said.asked
    assert "another attempt has followed" in capsys.readouterr().err


def test_nodes_that_failed_are_sent_back_for_a_few_turns_and_then_tried_all_the_same(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = submission(tmp_path, steps=30, attempts=9)
    said.gone = ["node2"]
    for _ in range(2):  # lost twice: node2 was gone each time
        assert begin(asked) == 0
    capsys.readouterr()
    for turn in range(3):
        assert begin(asked) == 0 and capsys.readouterr().out == ""
        assert said.asked[turn] == ("12", ["node2"])
    opened(asked, monkeypatch, capsys)
    assert len(said.asked) == 3 and kinds(tmp_path).count("left out") == 3
    assert begin(submission(tmp_path, steps=30, attempts=9, chain=4)) == 0 and len(said.asked) == 3  # a chain goes on


def test_a_run_that_loses_a_node_each_time_is_given_up_at_the_next_start(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = submission(tmp_path, steps=30, failures=9)
    said.gone = ["node1"]
    assert [begin(asked) for _ in range(4)] == [0, 0, 0, 93]
    assert "3 crashes in a row that did not get beyond the first checkpoint" in capsys.readouterr().err
    assert kinds(tmp_path)[-1] == "give up"
    Journal(Folder(tmp_path), True).event("submit", 0, job="13", submission="0002")
    assert begin(asked) == 93  # a job that comes after does not make this one's crashes undone
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert begin(asked) == 0 and kinds(tmp_path)[-1] == "attempt"  # who submits again has mended it


def test_bad_nodes_one_after_another_are_no_matter_of_nodes(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = submission(tmp_path, steps=30)
    codes = []
    for node in ("node1", "node2", "node3"):
        monkeypatch.setenv("NLSCALE_NODES", node)
        logs = opened(asked, monkeypatch, capsys)
        (logs / "preflight.json").write_text(f'{{"nodes": {{}}, "bad": {{"{node}": ["0 of 8 GPUs answer"]}}}}')
        codes.append(end(asked, 69))
    assert codes == [69, 69, 93] and said.asked == [("12", ["node1"]), ("12", ["node1", "node2"])]


def test_a_second_job_leaves_the_folder_of_one_that_runs_alone(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own attempt is neither opened nor told to be lost, so that the first one is judged and requeued as ever."""
    asked = submission(tmp_path, steps=30)
    logs = opened(asked, monkeypatch, capsys)
    holder = replace(this_process(1), job="12", host="elsewhere")
    Hold(tmp_path, 60.0).write(holder)
    states = {"12": "RUNNING"}
    monkeypatch.setattr(slurm, "facts_of", lambda number, seconds=None: {"JobState": states.get(number, "")})
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert begin(asked) == 78 and "job 12" in capsys.readouterr().err and kinds(tmp_path) == ["attempt"]
    states["12"] = "COMPLETED"
    assert begin(asked) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert followed(read_lines(Folder(tmp_path).events), 1, "12")  # as long as it may train
    Journal(Folder(tmp_path), True).event("attempt ended", 0, attempt=2, job="13", code=78, reason="", blamed=[])
    monkeypatch.setenv("NLSCALE_LOGS", str(logs))
    assert end(asked, 75) == 75


def test_a_file_system_that_is_away_sends_the_job_back(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a run that is not to go on, or whose next job waits already; and none goes back for ever."""

    def stale(_: str) -> Submission:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Submission, "read", stale)
    assert attempt.main(["begin", "there"]) == 1 and said.asked == [("12", [])]
    for count, code in enumerate((75, 0), 2):
        assert attempt.main(["end", "there", str(code)]) == code and len(said.asked) == count
    for code in (78, 93):
        assert attempt.main(["end", "there", str(code)]) == code and len(said.asked) == 3
    monkeypatch.setattr(Submission, "read", lambda _: submission(tmp_path, chain=3))
    monkeypatch.setattr(attempt, "end", lambda *_: stale(""))
    assert attempt.main(["end", "there", "75"]) == 75 and len(said.asked) == 3
    monkeypatch.setattr(Submission, "read", stale)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "20")
    assert attempt.main(["begin", "there"]) == 1 and len(said.asked) == 3


@pytest.mark.parametrize(
    ("errors", "took"),
    [
        (["Socket timed out on send/recv operation", "Zero Bytes were transmitted or received"], True),
        (["Invalid job id specified"], False),
    ],
)
def test_a_busy_controller_is_asked_again(errors: list[str], took: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    left = list(errors)

    def answer(*command: str, **_: object) -> subprocess.CompletedProcess:
        said = f"slurm_requeue error: {left.pop(0)}" if left else ""
        return subprocess.CompletedProcess(command, int(bool(said)), "", said)

    monkeypatch.setattr(slurm, "asked", answer)
    monkeypatch.setattr(slurm, "standing", lambda number: ("goes on", 0))
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert slurm.patient_requeue("12") is took and not left


def test_a_job_hears_nothing_of_the_one_it_was_submitted_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch hands its environment on: another job's number or rank would be taken for the new one's."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv > {tmp_path}/heard\necho 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PTY_PORT", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/there")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert slurm.submitted("job.sbatch") == "7"
    heard = dict(line.split("=", 1) for line in (tmp_path / "heard").read_text().splitlines() if "=" in line)
    assert heard["SLURM_CONF"] == "/etc/there" and heard["NCCL_DEBUG"] == "INFO"
    assert not [name for name in heard if name.startswith(("SLURM_", "TORCHELASTIC", "RANK")) and name != "SLURM_CONF"]


def test_as_many_nodes_as_a_job_needs_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"ExcNodeList": "node[1-2]", "NumNodes": "4-4", "Partition": "main"}
    asked: list[str] = []

    def answer(*command: str, seconds: float = 0.0) -> subprocess.CompletedProcess:
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(slurm, "facts_of", lambda number, seconds=None: facts)
    monkeypatch.setattr(slurm, "patient", lambda *command, seconds=None: "node1\nnode2\n")
    monkeypatch.setattr(slurm, "asked", answer)
    monkeypatch.setattr(slurm, "partitions", lambda: {"main": 7})
    assert slurm.exclude("12", ["node2", "node5"]) and slurm.exclude("12", ["node5", "node6"])
    assert asked == ["ExcNodeList=node1,node2,node5", "ExcNodeList=node2,node5,node6"]
    monkeypatch.setattr(slurm, "partitions", lambda: {"main": 4})
    assert slurm.exclude("12", ["node5"]) and asked[-1] == "ExcNodeList="
