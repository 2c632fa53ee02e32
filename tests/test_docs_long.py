"""Commands of the documentation that take long or start many: each by its own words, with less to do.

Benches that train models or measure for minutes train for a step and measure once: their whole way to the table is gone,
not the time that figures need.
"""

import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nlscale_launch.local import free_port

from nlscale.cli import main
from nlscale.testing import ranks
from nlscale.verbs.saved import BENCHES
from tests.test_docs import ALL, CONCRETE, LONG, ROOT

Work = Callable[..., Any]


def in_turn(*fewer: Any) -> Callable[[Work, Mapping[Any, Sequence[Any]]], Iterator[tuple[Any, Any]]]:
    """`side_by_side` in this process, where each job is told to train for so few steps."""

    def jobs(work: Work, given: Mapping[Any, Sequence[Any]]) -> Iterator[tuple[Any, Any]]:
        yield from ((key, work(*each, *fewer)) for key, each in given.items())

    return jobs


def forgetting(work: Work, given: Mapping[Any, Sequence[Any]]) -> Iterator[tuple[Any, Any]]:
    """Of both kinds of jobs, whose streams have two parts and three; some say how long they are."""
    seeds = {key: [each for each in said if not isinstance(each, tuple)] for key, said in given.items()}
    yield from in_turn((8, 8) if work.__name__ == "recovered" else (8, 8, 8))(work, seeds)


def memories(bench: ModuleType) -> dict[str, Any]:
    """HOPE alone, of one layer, and nothing of it compiled, which takes minutes."""
    small: dict[str, Any] = {}
    for name in (bench.COMPILED, bench.INSIDE):
        said, limit = bench.MODELS[name]
        small[name] = [*(each for each in said if not each.startswith("train.")), "model.layers=1"], limit
    return small


def only(operator: str) -> SimpleNamespace:
    """`subprocess`, whose compilation ahead of time is of one operator."""
    return SimpleNamespace(run=lambda command, **how: subprocess.run([*command, operator], **how))


def less(name: str, bench: ModuleType) -> dict[str, Any]:
    """What of a bench's module is made smaller."""
    few: dict[str, Callable[[], dict[str, Any]]] = {
        "hops": lambda: {"side_by_side": in_turn(1)},
        "beyond": lambda: {"side_by_side": in_turn(1)},
        "states": lambda: {"side_by_side": in_turn(1)},
        "forgetting": lambda: {"side_by_side": forgetting, "SEEDS": (1,), "RESETS": (1, 2), "HELD_OUT": 8},
        "classes": lambda: {"side_by_side": in_turn((1, 1)), "SEEDS": (1,)},
        "parts": lambda: {"SEEDS": (1,), "MODEL": [*bench.MODEL, "train.steps=1", "train.evaluate_rows=8"]},
        "levels": lambda: {"SHAPE": [*bench.SHAPE, "model.width=64", "model.layers=2", "model.hidden=256"]},
        "memory": lambda: {"SIZES": {"10M": bench.SIZES["10M"]}},
        "memories": lambda: {"ROUNDS": 1, "ROWS": 1, "LENGTHS": (64, 128), "MODELS": memories(bench)},
        "kernels": lambda: {"subprocess": only("level_step")},
        "ladder": dict,
    }
    return few[name]()


def shrunk(name: str, table: str) -> int:
    """`nlscale bench NAME --json TABLE`, its exit code."""
    bench = importlib.import_module(f"nlscale.bench.{name}")
    vars(bench).update(less(name, bench))
    for told in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(told, None)  # of this process, not of those that it starts
    if name == "memories":
        bench.peaks_of.__kwdefaults__["processes"] = 1
    return main(["bench", name, "--json", table])


SAID = {said.split()[2] for said in CONCRETE if said.split()[1] == "bench"}


def test_every_long_bench_is_looked_at() -> None:
    """And what is made smaller is there: a name that a bench no longer has would leave it as long as it is."""
    assert set(LONG) - {"ladder"} <= SAID <= set(BENCHES)
    for name in LONG:
        bench = importlib.import_module(f"nlscale.bench.{name}")
        assert set(less(name, bench)) <= set(vars(bench)), name


@pytest.mark.matrix
@pytest.mark.parametrize("name", sorted(set(LONG) - {"ladder"}))
def test_long_benches_print_their_tables(name: str, tmp_path: Path) -> None:
    """Whether their targets are kept after a step of training is not asked."""
    table = tmp_path / "table.json"
    (code,) = ranks(1, shrunk, name, str(table), timeout=600)
    said = json.loads(table.read_text())
    assert said.keys() == {"rows", "machine", "versions"} and code in (0, 1) and len(said["rows"]) > 1
    assert all(math.isfinite(row["value"]) for row in said["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_the_ladders_bench_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ladder"]) == 78
    assert "nlscale plan" in capsys.readouterr().err


SMALL = ["train.steps=2", "train.evaluate_rows=2", "log.wandb=disabled", "model.width=64", "model.layers=2"]
SMALL += ["model.heads=4", "model.kv_heads=4", "model.hidden=128", "train.global_batch=4", "train.micro_batch=1"]


def documented(word: str, *parts: str) -> list[str]:
    """The words of the one documented command that begins so and holds all the parts."""
    (said,) = {said for _, said in ALL if said.startswith(word) and all(part in said for part in parts)}
    return shlex.split(said)


def started(words: Iterable[str], fill: dict[str, str]) -> list[str]:
    """A torchrun command of the documentation, on this interpreter and with its placeholders filled in."""
    first, *rest = words
    assert first == "torchrun"
    filled = [re.sub("|".join(fill), lambda found: fill[found[0]], word) for word in rest]
    return [sys.executable, "-m", "torch.distributed.run", *filled]


NODE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$0" "$@"']


def separate() -> bool:
    """Whether processes may be given a /dev/shm of their own, as another machine's have."""
    return subprocess.run([*NODE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_starts_ranks_as_documented(nodes: int, prepared: str, tmp_path: Path) -> None:
    """On one node, and on two, each of which is a torchrun of its own."""
    parts = ("--standalone",) if nodes == 1 else ("--rdzv-endpoint",)
    fill = {"HOST:29500": f"127.0.0.1:{free_port()}", "RECIPE": "demo"}
    words = [str(2 // nodes) if word == "8" else word for word in documented("torchrun", *parts)]
    more = [*SMALL, f"data.path={prepared}", "data.sequence=32", f"run.folder={tmp_path / 'run'}", "parallel.tensor=2"]
    command = [*started(words, fill), *more]
    if nodes > 1 and not separate():
        pytest.skip("two nodes on one machine need a /dev/shm each, which only root can mount")
    command = [*(NODE if nodes > 1 else []), *command]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    begun = []
    for node in range(nodes):  # each with a /tmp of its own, too, where jobs of one machine wait for each other
        (own := tmp_path / f"node{node}").mkdir()
        begun.append(subprocess.Popen(command, env=os.environ | {"TMPDIR": str(own)}, **piped))  # type: ignore[call-overload]
    told = [each.communicate(timeout=200)[0] for each in begun]
    assert [each.returncode for each in begun] == [0] * nodes, told
    assert sum("2 ranks, 1 replica, " in said for said in told) == 1, told
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").is_file()


@pytest.mark.matrix
def test_layouts_are_written_as_documented(tmp_path: Path) -> None:
    """`python -m nlscale.plan.tables` for the smallest of all tables, in a copy of the configs."""
    words = documented("python", "nlscale.plan.tables")
    program = (
        "import pathlib, runpy, shutil, sys, nlscale.config.read as read\n"
        f"copy = pathlib.Path({str(tmp_path / 'configs')!r})\n"
        "shutil.copytree(read.CONFIGS, copy)\n"
        "(copy / 'layout' / 'h200-1.yaml').write_text('')\n"
        "read.CONFIGS = copy\n"
        f"sys.argv = [{words[2]!r}, 'h200-1']\n"
        f"runpy.run_module({words[2]!r}, run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=280)
    written, shipped = (folder / "layout" / "h200-1.yaml" for folder in (tmp_path / "configs", ROOT / "configs"))
    assert written.read_text() == shipped.read_text()


@pytest.mark.matrix
@pytest.mark.parametrize(("tests", "golden", "few"), [("config", "config", ""), ("slurm", "sbatch", "script")])
def test_golden_files_are_written_as_documented(tests: str, golden: str, few: str, tmp_path: Path) -> None:
    """`--update-golden` in a copy, from nothing, makes what is here."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    here, there = (root / "tests" / "golden" / golden for root in (ROOT, tmp_path))
    assert len(names := [file.name for file in there.iterdir()]) > 1
    for name in names:
        (there / name).write_text("")
    words = [*documented("pytest", f"tests/{tests}", "--update-golden"), "-q", *(["-k", few] if few else [])]
    subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, timeout=280, capture_output=True, check=False)
    for name in names:
        assert (there / name).read_text() == (here / name).read_text(), name


@pytest.mark.matrix
@pytest.mark.parametrize("option", ["-k", "-s"])
def test_tests_of_the_queue_are_run_as_documented(option: str) -> None:
    """All of them are the last part of `make test`; here those that need no cluster."""
    words = ["test_policy" if word == "NAME" else word for word in documented("pytest", "tests/slurm", f" {option}")]
    words += [] if option == "-k" else ["-k", "test_policy"]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, timeout=280, capture_output=True, text=True, check=True
    )
    assert re.search(r"\d+ passed", done.stdout) and "failed" not in done.stdout


@pytest.mark.matrix
@pytest.mark.parametrize("out", ["web --sequence 4096", "mine --sequence 512"])
def test_a_corpus_is_prepared_as_documented(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many words as the documentation's tokeniser has, of text that has them."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    words = ["".join(each) for each in random.choice([*"aeilmnorst"], (40_000, 9))]
    lines = [json.dumps({"text": " ".join(random.choice(words, 300))}) for _ in range(2_000)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    said = documented("nlscale", f"data prepare FILES --out corpora/{out}")
    assert main([{"FILES": "text.jsonl"}.get(word, word) for word in said[1:]]) == 0
    assert main(["data", "verify", f"corpora/{out.split()[0]}"]) == 0
