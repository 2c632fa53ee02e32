"""The program as a person uses it: exit codes, one clear line for a mistake, and no torch where none is needed."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from nlscale_launch.local import start

from nlscale.cli import main
from nlscale.config.read import read
from nlscale.runtime.world import join, leave
from tests.tiny import tiny

PROGRAM = [sys.executable, "-m", "nlscale.cli"]
SHAPE = [
    "model.layers=2",
    "model.width=32",
    "model.heads=4",
    "model.kv_heads=2",
    "model.hidden=64",
    "data.sequence=32",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.evaluate_rows=4",
    "train.evaluate_interval=3",
    "log.wandb=disabled",
]


def nlscale(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=timeout)


MISTAKES = {
    "misspelt key": (["optim.lrr=1"], "Key 'lrr' not in 'Optim'. Did you mean: 'lr'"),
    "unknown section": (["optimiser.lr=1"], "not in 'Run'"),
    "wrong type": (["train.steps=many"], "could not be converted to Integer"),
    "not a choice": (["train.precision=fp8"], "expected one of"),
    "out of range": (["optim.lr=-1"], "optim.lr=-1.0 must be above 0"),
    "heads by tensor": (["parallel.tensor=4"], "model.kv_heads=2 cannot be split over parallel.tensor=4"),
    "layers by pipeline": (["parallel.pipeline=3"], "stages in [1, 2] or model.layers=3 would work"),
    "world by layout": (["--gpus", "3"], "2, 4, 8 ... ranks would work"),
    "batch by replicas": (["--gpus", "16"], "train.global_batch=4 is no multiple of 8 replicas"),
    "periods": (
        ["levels=[{name: a, period: 1, width: 0.5}, {name: b, period: 4, width: 0.5}, {name: c, period: 6, width: 0}]"],
        "4 or 8 would work",
    ),
    "widths": (["levels=[{name: a, period: 1, width: 0.5}]"], "must sum to 1, got 0.5"),
    "no data": (["data.path=nowhere"], "data.path=nowhere: no such folder"),
    "another sequence": (["data.sequence=64"], "data.sequence=32 would work"),
    "small vocabulary": (["model.vocabulary=128"], "smaller than the 257 tokens"),
    "no recipe section": (["use.model=huge"], "choose from"),
    "a place in a list": (["levels.3.period=16"], "levels is a list: give it whole"),
    "no assignment": (["verbose"], "overrides have the form section.key=value"),
}


LEVELS = {
    "{name: fast}, {name: slow, perid: 4}": "Did you mean: 'period'? (at levels.slow.perid)",
    "{name: fast, period: often}": "Value 'often' of type 'str' could not be converted to Integer (at levels.fast.period)",
    "{nmae: fast}": "Did you mean: 'name'? (at levels.0.nmae)",
    "{name: fast, unit: tokens}": "expected one of ['step', 'token'] (at levels.fast.unit)",
    "3": "int is not a subclass of Level. value: 3 (at levels[0])",
}


@pytest.mark.parametrize("levels", LEVELS)
def test_a_mistake_in_a_level_names_the_level(levels: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "demo", f"levels=[{levels}]"]) == 78
    said = capsys.readouterr().err
    assert LEVELS[levels] in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_78_in_two_seconds(mistake: str, prepared: str) -> None:
    extra, words = MISTAKES[mistake]
    began = time.monotonic()
    result = nlscale("check", "demo", *SHAPE, f"data.path={prepared}", "use.parallel=tensor2", *extra)
    assert time.monotonic() - began < 2
    assert words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == 78


WORDS = {
    "a verb": (["trian", "demo"], "(did you mean 'train'?)"),
    "no verb": ([], "are required: VERB; `nlscale --help` says more"),
    "a group's verb": (["checkpoint", "lst", "demo"], "(did you mean 'list'?)"),
    "an option": (["check", "demo", "--gpuz", "3"], "unknown argument --gpuz (did you mean '--gpu'?); overrides have"),
    "a value": (
        ["check", "demo", "--gpus", "x"],
        "argument --gpus: invalid int value: 'x'; `nlscale check --help` says",
    ),
    "a word too many": (["check", "demo", "verbose"], "unknown argument verbose; overrides have the form"),
    "an override of a verb without a run": (
        ["checkpoint", "list", "demo", "a.b=1"],
        "unknown argument a.b=1; overrides",
    ),
    "a bench": (["bench", "stpe"], "(did you mean 'step'?)"),
    "a recipe": (["check", "125m-hop"], "no recipe '125m-hop' (did you mean '125m-hope'?)"),
    "a file of a section": (
        ["check", "demo", "use.levels=fuor"],
        "use.levels=fuor (did you mean 'four'?): choose from",
    ),
    "a model with layouts": (
        ["check", "7b-hope", "use.model=7bb", "--gpus", "8"],
        "use.model=7bb (did you mean '7b'?)",
    ),
    "a section": (["check", "demo", "model=350m"], "model=350m: model is a section; use.model=350m names a file of it"),
    "a file's number": (["check", "demo", "use.model=1"], "use.model=1: the name of a file is a word"),
    "a layout's number": (["check", "demo", "use.layout=64"], "use.layout=64: the name of a file is a word"),
    "no file at all": (["check", "demo", "use=demo"], "use=demo: use.SECTION=NAME names the file of a section"),
    "an open bracket": (["check", "demo", "optim.lr={"], "optim.lr={: while parsing a flow node"),
    "an open list": (["check", "demo", "levels=[{name: a"], "levels=[{name: a: while parsing a flow mapping"),
    "too many ranks": (
        ["train", "demo", "--nproc", "100000", "train.global_batch=400000"],
        "100000 ranks would start on this machine's",
    ),
    "no UTF-8": (["check", "demo", "run.name=\udcff"], "'run.name=\\udcff' is no UTF-8"),
    "no source": (["data", "prepare", "", "--out", "x"], "a source is a path, a folder, a glob or the word stdlib"),
    "no network's layers": (
        ["check", "demo", "model.layers=1000000000"],
        "model.layers=1000000000 must be at most 1024",
    ),
    "no ranks": (["train", "demo", "--nproc", "0"], "--nproc 0 must be at least 1"),
    "fewer than no ranks": (["train", "demo", "--nproc", "-2"], "--nproc -2 must be at least 1"),
    "fewer than no workers": (
        ["data", "prepare", "stdlib", "--out", "x", "--workers", "-1"],
        "--workers -1 must not be",
    ),
    "no place for a bench": (["bench", "step", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: No such file"),
    "a cluster": (["submit", "demo", "--nodes", "1", "--cluster", "h100-ifa"], "h100-ifa (did you mean 'h100-efa'?)"),
}


@pytest.mark.parametrize("mistake", WORDS)
def test_a_misspelt_command_is_one_line_that_says_what_was_meant(
    mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given, words = WORDS[mistake]
    assert main(given) == 78
    said = capsys.readouterr()
    assert words in said.err and not said.out and len(said.err.splitlines()) == 1, said.err


def test_check_says_what_it_would_do_without_torch(prepared: str) -> None:
    code = (
        "import sys; from nlscale.cli import main; "
        f"assert main(['check', 'demo', {', '.join(map(repr, SHAPE))}, 'data.path={prepared}']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "tensor 2 x pipeline 1 x 1 replica = 2 ranks" in result.stdout


@pytest.mark.parametrize("section", ["levels", "model", "cluster", "layout"])
def test_a_file_that_is_not_named_is_none(section: str) -> None:
    for said in ("", "null"):
        assert read("demo", [f"use.{section}={said}"]).run.name == "demo"


@pytest.mark.parametrize("name", ["off", "on", "007", "1e5", "a.b-c_d", "nullable"])
def test_a_name_is_what_was_said(name: str) -> None:
    """Though YAML has other words for some."""
    run = read("demo", [f"run.name={name}", f"data.path={name}", f"run.folder={name}"])
    assert (run.run.name, run.data.path, run.run.folder) == (name, name, name)
    assert read("demo", ["data.path=null", "data.streams=[{path: a, weight: 1}]"]).data.path is None


@pytest.mark.parametrize("content", [None, "", "- a list\n", "model: [unclosed\n", "\xff"])
def test_a_recipe_that_cannot_be_read_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    result = nlscale("check", str(path))
    assert result.returncode == 78 and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_train_resumes_finishes_and_reports(prepared: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["train", "demo", *SHAPE, f"data.path={prepared}", f"run.folder={folder}", "train.steps=6"]
    first = nlscale(*command, "train.stop_at=4")
    assert first.returncode == 0, first.stderr
    second = nlscale(*command)
    assert second.returncode == 0, second.stderr
    assert "goes on after step 4" in second.stdout and "last loss" in second.stdout
    third = nlscale(*command)
    assert third.returncode == 0 and "the run is finished: step 6 of 6" in third.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6]
    keys = "tokens optim/grad_norm optim/lr comm/bytes throughput/tokens_per_second throughput/step_seconds"
    keys += " throughput/data_wait_seconds throughput/mfu memory/peak_bytes data/token_hash comm/level/slow/bytes"
    keys += " optim/level/fast/fired optim/level/fast/update_norm optim/level/fast/grad_norm"
    assert set(keys.split()) <= lines[0].keys()
    for name in (
        "config.yaml",
        "events.jsonl",
        "plots/loss.png",
        "plots/loss.svg",
        "logs/3/rank-00000.log",
        "logs/3/rank-00001.log",
    ):
        assert (folder / name).is_file(), name
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000006\n"
    assert nlscale("check", str(folder / "config.yaml")).returncode == 0
    assert nlscale("checkpoint", "verify", str(folder)).returncode == 0
    assert "step        6" in nlscale("checkpoint", "list", str(folder), "--json", str(tmp_path / "list.json")).stdout
    listed = json.loads((tmp_path / "list.json").read_text())
    assert [each["step"] for each in listed["checkpoints"]] == [4, 6] and "slow" in listed["learners"]
    stored = sum(file.stat().st_size for file in (folder / "checkpoints" / "step-00000006").iterdir())
    assert listed["checkpoints"][-1]["bytes"] == stored
    assert nlscale("plot", str(folder), "--out", str(tmp_path / "a.png")).returncode == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    other = nlscale(*command, "model.hidden=128")
    assert other.returncode == 78 and "holds another model" in other.stderr and "Traceback" not in other.stderr


def test_a_signal_saves_and_asks_to_go_on(prepared: str, tmp_path: Path) -> None:
    command = [
        *PROGRAM,
        "train",
        "demo",
        *SHAPE,
        f"data.path={prepared}",
        f"run.folder={tmp_path}",
        "train.steps=100000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "saved at step" in errors and "Traceback" not in errors
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (tmp_path / "checkpoints" / f"step-{steps[-1]:08d}" / "manifest.json").is_file()


def test_a_folder_that_cannot_be_written_is_refused(prepared: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = nlscale("train", "demo", *SHAPE, f"data.path={prepared}", f"run.folder={tmp_path / 'file' / 'run'}")
    assert result.returncode == 78 and "cannot write the run folder" in result.stderr


def test_help_names_every_verb() -> None:
    text = nlscale("--help").stdout
    for verb in ("train", "check", "data", "plot", "checkpoint", "bench"):
        assert verb in text
    assert nlscale("data", "prepare", "--help").returncode == 0


def test_data_verbs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("slow weights remember\n" * 200)
    made = nlscale(
        "data",
        "prepare",
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "o"),
        "--tokeniser",
        "bytes",
        "--sequence",
        "64",
        "--held-out",
        "0",
    )
    assert made.returncode == 0 and "fingerprint" in made.stdout
    assert nlscale("data", "verify", str(tmp_path / "o")).returncode == 0
    shard = next((tmp_path / "o").rglob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-9])
    damaged = nlscale("data", "verify", str(tmp_path / "o"))
    assert damaged.returncode == 78 and shard.name in damaged.stderr
    empty = nlscale("data", "prepare", str(tmp_path / "none.txt"), "--out", str(tmp_path / "p"))
    assert empty.returncode == 78 and "names no file" in empty.stderr


def test_a_run_finds_a_port_of_its_own_beside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the default port, ranks that are started here meet elsewhere."""
    monkeypatch.delenv("MASTER_PORT", raising=False)

    def meet(rank: int) -> int:
        run = tiny()
        world = join(run.parallel, run.cluster, 0)
        dist.barrier()
        leave()
        return world.size - 2

    with socket.socket() as holder:
        with contextlib.suppress(OSError):  # somebody else holds it: as well
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("", 20000))
            holder.listen()
        assert start(2, meet, timeout=60) == 0


def test_a_run_that_crashes_is_started_again_while_it_gets_further(
    prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`--restart` here: crashes at steps 5 and 9 are passed, each by a checkpoint; three at step 12 end the run with 93."""
    from nlscale.train import loop

    plain = loop.train_step

    def step(state, *rest):  # type: ignore[no-untyped-def]
        attempts = len(list((tmp_path / "logs").iterdir()))
        if state.step + 1 == {1: 5, 2: 9}.get(attempts, 12):
            raise RuntimeError(f"a fault in attempt {attempts}")
        return plain(state, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    command = ["train", "demo", *SHAPE, f"data.path={prepared}", f"run.folder={tmp_path}", "train.steps=20"]
    command += ["checkpoint.asynchronous=false"]  # else a crash may come before the last save is done
    code = main([*command, "checkpoint.interval=2", "--restart", "--nproc", "1", "parallel.tensor=1"])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    ended = [(event["code"], event["step"]) for event in events if event["event"] == "attempt ended"]
    assert code == 93 and ended == [(1, 4), (1, 8), (1, 10), (1, 10), (1, 10)]
    assert [event["reason"] for event in events if event["event"] == "give up"] == [
        "3 crashes in a row that did not get beyond the checkpoint of step 10"
    ]
    assert any("RuntimeError: a fault in attempt 3" in event.get("reason", "") for event in events)
    capfd.readouterr()
    assert main(["status", str(tmp_path)]) == 0
    head, row, _, held, *spent = capfd.readouterr().out.splitlines()
    assert held.startswith("machines were held for")
    assert [" ".join(line.split()[:-3]) for line in spent] == [
        "productive", "data wait", "recomputed", "checkpoint", "evaluation", "restart", "other",
    ]  # fmt: skip
    again = [event["steps"] for event in events if event["event"] == "again"]
    assert again == [1, 1]  # step 11, which no checkpoint held
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ledgers = [line for line in lines if "goodput/share" in line]
    assert [line["step"] for line in ledgers] == [2, 4, 6, 8, 10]
    parts = [value for key, value in ledgers[-1].items() if key.endswith("_seconds") and "held" not in key]
    assert sum(parts) == pytest.approx(ledgers[-1]["goodput/held_seconds"], abs=0.1) and len(parts) == 7
    assert 0 < ledgers[-1]["goodput/share"] < 1
    assert head.split() == ["run", "state", "step", "loss", "tokens/s", "checkpoint", "attempts", "goodput", "what"]
    assert row.split()[1:3] == ["stopped", "11"] and row.split()[5:7] == ["10", "5"] and "3 crashes in a row" in row
    assert main(["logs", str(tmp_path), "--attempt", "2"]) == 0
    assert "2/rank 0 | demo goes on after step 4" in capfd.readouterr().out
    assert main(["logs", str(tmp_path), "--rank", "7"]) == 78 and "no log of rank 7" in capfd.readouterr().err
    assert main(["logs", str(tmp_path), "--rank", "x"]) == 78 and "a number, or all" in capfd.readouterr().err


def test_runs_without_a_queue_are_told_by_their_folders(
    prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`status` of all in runs/, `cancel` of one that trains here, and of one that does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["status"]) == 78 and "no run" in capfd.readouterr().err
    command = [*PROGRAM, "train", "demo", *SHAPE, f"data.path={prepared}", "run.name=here", "train.steps=100000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        metrics, deadline = tmp_path / "runs" / "here" / "metrics.jsonl", time.monotonic() + 60
        while not metrics.is_file() or not metrics.read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        assert main(["status"]) == 0 and " running " in capfd.readouterr().out
        assert main(["cancel", "here"]) == 0 and "saves and ends" in capfd.readouterr().out
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert main(["status", "here"]) == 0
    assert "saved at step" in capfd.readouterr().out
    assert main(["cancel", "here"]) == 78 and "no process of it on this host" in capfd.readouterr().err
