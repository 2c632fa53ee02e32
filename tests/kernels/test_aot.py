"""Every kernel and config as machine code of sm_80 and sm_90, in a process of its own: here triton interprets."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import triton
from nlscale_kernels import aot, launched
from nlscale_kernels.switch import OPERATORS, kernels
from nlscale_kernels.triton_build import Launch


def compiled(target: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(target.parent / "cache")}
    command = [sys.executable, "-m", "nlscale_kernels.aot", *arguments, "--json", str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done, json.loads(target.read_text()) if target.exists() else []


GOLDEN = Path(__file__).parents[1] / "golden" / "machine_code"
SLACK = {"registers": (1.1, 8), "spills": (1.1, 64), "shared": (1.0, 1024)}  # times, and more


def grown(before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    """Kernels that are new, gone, or need more than they did."""
    more = [
        f"{name}: {what} {now[name][what]}, was {before[name][what]}"
        for name in before.keys() & now.keys()
        for what, (times, beside) in SLACK.items()
        if now[name][what] > times * before[name][what] + beside
    ]
    return sorted([*more, *(f"{name}: not in the golden file, or there alone" for name in before.keys() ^ now.keys())])


@pytest.mark.parametrize("operator", aot.OPERATORS)
def test_machine_code_keeps_its_budget(operator: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """And needs no more than it did; `pytest tests/kernels/test_aot.py --update-golden` after a change that is worth it."""
    done, found = compiled(tmp_path / "found.json", operator)
    assert done.returncode == 0, done.stdout + done.stderr
    launches = import_module(f"nlscale_kernels.{operator}.triton").launches()
    expected = sum(config.least <= arch for each in launches for config in each.configs for arch in (80, 90))
    assert len(found) == expected and not any(each["faults"] for each in found)
    for each in found:
        wide = (
            each["kernel"] in {launch.name for launch in launches if launch.product} and "TILE=32" not in each["config"]
        )
        if each["arch"] == 90 and wide:
            assert each["products"].get("HGMMA"), each
    now = {
        f"{each['kernel']} {each['config']} sm_{each['arch']}": {what: each[what] for what in SLACK} for each in found
    }
    assert len(now) == len(found)
    file = GOLDEN / f"{operator}.triton{''.join(triton.__version__.split('.')[:2])}.json"
    if request.config.getoption("--update-golden"):
        file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    if file.is_file():  # other versions are held to the budgets alone
        assert not grown(json.loads(file.read_text()), now)
    assert list(GOLDEN.glob(f"{operator}.*.json"))


def test_a_kernel_that_grows_is_named() -> None:
    before = {"a": {"registers": 100, "spills": 0, "shared": 4096}, "b": {"registers": 40, "spills": 0, "shared": 0}}
    assert grown(before, {**before, "a": {"registers": 118, "spills": 64, "shared": 5120}}) == []
    now = {"a": {"registers": 119, "spills": 65, "shared": 5121}, "c": before["b"]}
    assert grown(before, now) == [
        "a: registers 119, was 100",
        "a: shared 5121, was 4096",
        "a: spills 65, was 0",
        "b: not in the golden file, or there alone",
        "c: not in the golden file, or there alone",
    ]


def test_every_operator_with_a_kernel_is_compiled() -> None:
    assert {name.split(".")[0] for name in OPERATORS} == set(aot.OPERATORS)


def test_every_way_to_launch_a_kernel_is_known() -> None:
    """What `aot --launched` compiles has all ways that matter for speed, but for numbers, and kernels for every dtype."""
    every = [launch for operator in aot.OPERATORS for launch in launched.launches_of(operator, 90)]
    timed = [launch for name in aot.OPERATORS for launch in import_module(f"nlscale_kernels.{name}.triton").launches()]
    assert {way_of(launch) for launch in timed} <= {way_of(launch) for launch in every}
    names = {name_of(launch) for launch in every}
    for name in names - {f"nlscale_kernels.self_modifying.triton_backward.{each}" for each in WALK}:
        given = {value for launch in every if name_of(launch) == name for value in launch.arguments}
        assert {torch.bfloat16, torch.float16} <= given and (torch.float32 in given or "newton" in name), name


WALK = ("walk_kernel", "gradients_kernel")  # in float32 alone


def way_of(launch: Launch) -> tuple[str, tuple[bool, ...], frozenset[tuple[str, bool]]]:
    """Its kernel, which arguments are absent, which switches are on."""
    switches = {(k, v) for k, v in launch.constants.items() if isinstance(v, bool) and k != "UPCAST"}
    return name_of(launch), tuple(value is None for value in launch.arguments), frozenset(switches)


def name_of(launch: Launch) -> str:
    return f"{launch.kernel.fn.__module__}.{launch.kernel.fn.__name__}"


def test_a_broken_budget_is_named() -> None:
    launch = import_module("nlscale_kernels.newton_schulz.triton").launches()[0]
    assert launch.product and launch.registers == 255 and launch.spills == 0
    script = (
        "from dataclasses import replace; from nlscale_kernels import aot; import nlscale_kernels.level_step.triton as t;"
        "launch = replace(t.launches()[0], registers=8, product=True);"
        "print(aot.build('level_step', [(launch, launch.configs[0])], 90)[0].faults)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "registers, at most 8" in said.stdout and "no tensor-core instruction" in said.stdout


def test_the_interpreter_is_refused() -> None:
    with pytest.raises(SystemExit):
        aot.main(["level_step"])
    with pytest.raises(SystemExit):
        aot.main(["nothing"])


def test_the_switch_takes_references_and_gives_kernels_back() -> None:
    def off() -> set[str]:
        return {name for name, operator in OPERATORS.items() if "cuda" in operator._disabled_kernel}

    assert all("cuda" in operator._backend_fns for operator in OPERATORS.values())
    with kernels("reference"):
        assert off() == set(OPERATORS)
    with kernels("fused"):
        assert not off()
    assert not off()


AT_ONCE = """
import sys
from pathlib import Path
from nlscale_kernels import aot, machine_code
from nlscale_kernels.level_step import triton as level_step
from nlscale_kernels.newton_schulz import triton as newton_schulz
from triton import knobs

def by_itself(kernel):
    Path(sys.argv[1]).write_bytes(kernel.asm["cubin"])
    said = machine_code.tool(knobs.nvidia.cuobjdump.path, "-sass", sys.argv[1])
    return machine_code.counted(filter(None, map(machine_code.INSTRUCTION.match, said.splitlines())))

launches = (*newton_schulz.launches()[:2], *level_step.launches()[:2])
kernels = [aot.compiled(each, each.configs[0], 90).kernel for each in launches]
found = machine_code.instructions(kernels)
assert found == [by_itself(each) for each in kernels], found
assert [bool(each["HGMMA"]) for each in found] == [True, True, False, False] and all(each["EXIT"] for each in found)
print(len(found))
"""


def test_code_that_is_read_at_once_is_the_code_of_each(tmp_path: Path) -> None:
    """Instructions as another tool has them for every kernel by itself."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path / "kernel.cubin")]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "4\n"
