"""What a rank leaves of its end, whom an error is about, and which processes are ranks at all."""

import argparse
import json
from pathlib import Path

import pytest

from nlscale.config.errors import BadHosts, UserError, code_of
from nlscale.runtime.muster import host_of
from nlscale.runtime.outcome import blamed, tell, told
from nlscale.verbs.training import rank_given


def test_the_first_reason_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(75, 0, "nobody listens")
    assert not list(tmp_path.iterdir()) and told(tmp_path) == {}
    monkeypatch.setenv("NLSCALE_LOGS", str(tmp_path))
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    tell(75, 2, "saved at step 5", ["node9"])
    tell(1, 0, "a peer is gone")
    assert told(tmp_path) == {"code": 75, "rank": 2, "host": "node3", "message": "saved at step 5", "hosts": ["node9"]}
    (tmp_path / "exit.json").write_text(json.dumps({"code": 1})[:-1])
    assert told(tmp_path) == {}


@pytest.mark.parametrize(
    ("error", "hosts"),
    [
        (BadHosts("rank 5 (host node2): its matrix product is wrong", ["node2"]), ["node2"]),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), ["node1"]),
        (RuntimeError("CUDA error: device-side assert triggered"), []),
        (RuntimeError("shapes do not fit"), []),
        (UserError("no"), []),
        (ConnectionError("Connection closed by peer [10.0.0.2]"), []),
    ],
)
def test_an_error_of_the_program_blames_no_node(
    error: Exception, hosts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    assert blamed(error) == hosts
    assert code_of(error) == (78 if isinstance(error, UserError) else 1)


def test_ranks_fill_the_jobs_nodes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NLSCALE_NODES", raising=False)
    assert host_of(3, 8) == ""
    monkeypatch.setenv("NLSCALE_NODES", "b,a")
    assert [host_of(rank, 8) for rank in (0, 3, 4, 7)] == ["b", "b", "a", "a"]
    assert host_of(3, 7) == ""


@pytest.mark.parametrize(
    ("environment", "nproc", "rank"),
    [
        ({}, None, None),
        ({"RANK": "3"}, None, 3),
        ({"SLURM_PROCID": "2", "SLURM_STEP_ID": "0"}, None, 2),
        ({"SLURM_PROCID": "0"}, None, None),  # a job's own script
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "1"}, None, None),  # srun --pty bash
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, 8, None),
    ],
)
def test_who_is_a_rank(
    environment: dict[str, str], nproc: int | None, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_PTY_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_given(argparse.Namespace(nproc=nproc)) == rank
