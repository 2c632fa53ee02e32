"""Every target of make that the documentation names, run by make itself: programs stand in that do less of the same.

`make train` and `make test` are what CI runs, in a fresh clone.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_docs import MADE, ROOT

PROGRAMS = {
    "python": f"""
        import os, sys
        module, rest = sys.argv[2], sys.argv[3:]
        if module == "nlscale.cli":
            os.execv("{{folder}}/nlscale", ["nlscale", *rest])
        less = os.environ["LESS"].split() if module in ("pytest", "nlscale_kernels.aot") else []
        os.execv({sys.executable!r}, [{sys.executable!r}, "-m", module, *less, *rest])
    """,
    "nlscale": f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        from nlscale.cli import main
        from tests.test_docs_long import LONG, shrunk
        verb, name, *rest = sys.argv[1:]
        table = rest[-1] if rest else "{{folder}}/" + name + ".json"
        code = shrunk(name, table) if name in LONG and name != "ladder" else main([verb, name, "--json", table])
        sys.exit(0 if code == 1 and os.path.exists(table) else code)  # a target that is missed here says nothing
    """,
    "pip": """
        import os, sys
        os.makedirs(sys.argv[sys.argv.index("--target") + 1], exist_ok=True)  # the version that is here serves for others
    """,
}


def made(target: str, folder: Path, less: str = "", timeout: int = 250) -> subprocess.CompletedProcess[str]:
    """`make TARGET` by the Makefile of this tree, with less to do."""
    for name, program in PROGRAMS.items():
        lines = [line[8:] for line in program.format(folder=str(folder)).splitlines() if line]
        (folder / name).write_text("\n".join([f"#!{sys.executable}", *lines]))
        (folder / name).chmod(0o755)
    there = [f"VENV={folder}/venv", f"BIN={folder}", f"OUT={folder}/out"]
    kept = [word for each in ("installed", "tested") for word in ("--assume-old", f"{folder}/venv/{each}")]
    for each in ("installed", "tested"):
        (folder / "venv").mkdir(exist_ok=True)
        (folder / "venv" / each).touch()
    command = ["make", *kept, *there, *target.split()[1:]]
    own = ("TRITON_INTERPRET", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    environment = {key: value for key, value in os.environ.items() if key not in own} | {"LESS": less}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


LESS = {
    "make faults": "tests/data -k hundred",
    "make matrices": "tests/optim/test_schedule.py tests/optim/test_rules.py",
    "make kernels": "level_step",
}


def test_every_target_of_the_documentation_is_known_here() -> None:
    elsewhere = {"make train", "make test", "make gpu"}  # the last is the same script, by the Python of .venv
    elsewhere.add("make oldest")  # gigabytes
    assert set(MADE) == {*LESS, *elsewhere, "make bench", "make ladder", "make gpu BARE=python3"}


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", LESS)
def test_targets_run(target: str, tmp_path: Path) -> None:
    done = made(target, tmp_path, LESS[target], timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    said = {"make faults": "passed", "make matrices": "passed", "make kernels": "adamw"}
    assert said[target] in done.stdout and "failed" not in done.stdout


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_bench_prints_its_tables(tmp_path: Path) -> None:
    done = made("make bench", tmp_path, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in tmp_path.glob("*.json")} == {"step", "data", "levels", "memories"}


WITHOUT = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")


@WITHOUT
@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_all_that_needs_a_gpu_is_tried_in_one_go(tmp_path: Path) -> None:
    """Without one: tests are skipped, tables of the CPU are written, and what could not be done is named at the end."""
    done = made(f"make gpu BARE={tmp_path}/python", tmp_path, timeout=800)
    assert done.returncode == 2, done.stdout + done.stderr
    files = {path.stem for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert {*files, "step"} == set(re.findall(r"^(\w+): exit 0", done.stdout, re.M)), done.stdout
    assert re.search(r"failed: tune\(\d+\) (kernels\(\d+\) )?ladder\(78\)", done.stdout), done.stdout
    assert (tmp_path / "out" / "step.json").is_file()


@WITHOUT
def test_the_ladder_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    done = made("make ladder", tmp_path)
    assert done.returncode == 2 and "Error 78" in done.stderr and "nlscale plan" in done.stderr
