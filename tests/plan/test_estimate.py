"""Formula against simulation, and what layouts are ranked by."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from nlscale_kernels.self_modifying.given import WIDEST

from nlscale.cli import main
from nlscale.config.devices import DEVICES, device
from nlscale.config.errors import UserError
from nlscale.config.read import read
from nlscale.config.run import Run
from nlscale.plan.estimate import Estimate
from nlscale.plan.holding import ON_CHIP
from nlscale.plan.search import accepted, assessed, ranked
from nlscale.plan.simulate import stages
from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train.loop import train
from nlscale.verbs.planning import checkpoint_bytes, checkpoints_kept
from tests.corpus import small_run
from tests.sampled import sampled
from tests.tiny import LEVELS

TENSOR = ["parallel.tensor=4", "parallel.sequence=true"]
KEPT, SHORT = "model.self_modifying.recompute=false", ["use.layout=null", "model.layers=4", "data.sequence=1024"]
CASES = {
    "plain": ("1.3b-plain", 8, ["use.layout=null"]),
    "tensor": ("7b-hope-attention", 8, ["use.layout=null", *TENSOR]),
    "recompute": ("2.7b-hope-attention", 8, ["use.layout=null", "train.recompute=block", "train.micro_batch=2"]),
    "pipeline": ("30b-plain", 64, ["use.layout=null", *TENSOR, "parallel.pipeline=8"]),
    "interleaved": ("7b-plain", 32, ["use.layout=null", "parallel.pipeline=4", "parallel.virtual_pipeline=4"]),
    "eager": ("1.3b-hope-attention", 8, ["use.layout=null", "optim.reduce=eager"]),
    "hierarchical": ("1.3b-hope-attention", 32, ["use.layout=null", "optim.reduce=hierarchical", *TENSOR]),
    "offload": ("1.3b-hope-attention", 8, ["use.layout=null", "optim.offload=16"]),
    "fp32": ("760m-plain", 1, ["use.layout=null", "train.precision=fp32"]),
    "context": ("1.3b-plain", 8, ["use.layout=null", "parallel.context=4"]),
    "hope": ("760m-hope", 8, ["use.layout=null", "data.sequence=1024"]),
    "hope, as shipped": ("7b-hope", 64, ["use.layout=h100-64"]),
    "hope, tensor": ("1.3b-hope", 8, ["use.layout=null", *TENSOR]),
    "hope, recompute": ("1.3b-hope", 8, [*SHORT, "train.recompute=block", "model.self_modifying.maker_chunk=512"]),
    "hope, kept": ("760m-hope", 8, ["use.layout=null", "model.layers=4", KEPT]),
    "hope, kept, swiglu": ("760m-hope", 8, [*SHORT, KEPT, "model.self_modifying.activation=swiglu"]),
    "hope, kept, wide heads": ("760m-hope", 8, [*SHORT, KEPT, "model.heads=12"]),
    "hope, kept, per layer": (
        "760m-hope",
        8,
        [*SHORT, KEPT, "model.self_modifying.per_layer=true", "model.self_modifying.maker_chunk=512"],
    ),
    "hope, kept, plain": ("760m-hope", 8, [*SHORT, KEPT, "model.self_modifying.momentum=false"]),
    "delta": ("760m-plain", 8, ["use.layout=null", "model.mixer=delta", "data.sequence=1024"]),
    "titans": ("760m-plain", 8, ["use.layout=null", "model.mixer=titans", "data.sequence=1024"]),
    "linear": ("760m-plain", 8, ["use.layout=null", "model.mixer=linear", "data.sequence=512"]),
    "written": ("760m-plain", 8, ["use.layout=null", "model.mixer=written", "data.sequence=1024"]),
    "titans_mac": ("760m-plain", 8, ["use.layout=null", "model.mixer=titans_mac", "data.sequence=512"]),
    "titans_mag": ("760m-plain", 8, ["use.layout=null", "model.mixer=titans_mag", "data.sequence=512"]),
    "titans_mal": ("760m-plain", 8, ["use.layout=null", "model.mixer=titans_mal", "data.sequence=512"]),
}


def run_of(case: str) -> tuple[Run, int]:
    recipe, gpus, overrides = CASES[case]
    return read(recipe, overrides), gpus


def test_what_stays_on_chip_is_what_the_kernel_says() -> None:
    assert ON_CHIP == WIDEST


# Parts of the others, and what takes half a minute.
LEFT = ("hope, as shipped", "hope, tensor", "hope, kept", "hope, kept, swiglu", "hope, kept, wide heads")
LEFT += ("titans_mac", "titans_mag")


@pytest.mark.parametrize("case", sampled(CASES, LEFT))
def test_the_formula_is_near_the_simulation(case: str) -> None:
    """Of every stage: weights, windows and optimizer within 1 %, the peak within 10 %."""
    run, gpus = run_of(case)
    (simulated,) = ranks(1, stages, run, gpus, timeout=240)
    estimate = Estimate(run, gpus)
    for stage in simulated:
        formula = estimate.memory(stage.index)
        for name in ("weights", "windows", "masters", "moments", "host"):
            assert getattr(formula, name) == pytest.approx(getattr(stage.memory, name), rel=0.01, abs=2**22), name
        assert formula.resident == pytest.approx(stage.resident, rel=0.1), (stage, formula)


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.context=2", "model.kv_heads=4"],
        ["parallel.tensor=1"],
        ["optim.reduce=eager"],
        ["optim.reduce=hierarchical", "optim.node=1"],
    ],
)
def test_a_checkpoint_is_as_large_as_said(layout: list[str], prepared: str, tmp_path: Path) -> None:
    """Of a step inside every slow level's window, on two ranks."""
    large = [
        "model.width=128",
        "model.hidden=1024",
        "train.steps=4",
        "checkpoint.interval=3",
    ]  # beside what a tensor's name takes
    run = small_run(prepared, tmp_path, LEVELS, *large, *layout)
    ranks(2, train, run)
    saved = sum(path.stat().st_size for path in Folder(tmp_path).checkpoint(3).glob("*.distcp"))
    assert saved == pytest.approx(checkpoint_bytes(run, 2), rel=0.1)


def test_checkpoints_that_stay_are_counted() -> None:
    def count(*overrides: str) -> int:
        return checkpoints_kept(read("demo", ["train.steps=100", "checkpoint.interval=10", *overrides]))

    assert count("checkpoint.keep=3") == 4 and count("checkpoint.keep=0") == 10
    assert count("checkpoint.keep=2", "checkpoint.keep_every=50") == 5 and count("checkpoint.keep=30") == 10


def test_checkpoints_that_do_not_fit_the_disk_are_refused_and_fewer_that_do_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = ["350m-hope-attention", "--gpus", "1", "use.layout=null", "cluster.lead=100000"]
    said.append(f"run.folder={tmp_path}/nowhere/run")
    size, free = checkpoint_bytes(read(said[0], said[3:]), 1), [0.0]
    monkeypatch.setattr("nlscale.verbs.planning.shutil.disk_usage", lambda _: SimpleNamespace(free=free[0]))

    def told(times: float, *more: str) -> tuple[int, str]:
        free[0] = times * size
        return main(["check", *said, "checkpoint.keep=5", *more]), " ".join(capsys.readouterr().out.split())

    assert told(6.01)[0] == 0
    code, words = told(3.5)
    assert code == 78 and f"! 6 checkpoints of {size / 2**30:.1f} GiB" in words
    assert f"do not fit the {free[0] / 2**30:.1f} GiB that are free in {tmp_path}; checkpoint.keep=2 would fit" in words
    assert told(3.5, "checkpoint.keep=2")[0] == 0 and told(3.5, "checkpoint.keep=3")[0] == 78
    code, words = told(5.99, "checkpoint.keep_every=2000")
    assert code == 78 and "checkpoint.keep=4 checkpoint.keep_every=0 would fit" in words
    assert told(5.99, "checkpoint.keep=4", "checkpoint.keep_every=0")[0] == 0
    code, words = told(1.5)
    assert code == 78 and "run.folder must lie on a larger disk" in words


def test_a_run_folder_that_cannot_be_made_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    def told(folder: str) -> tuple[int, str]:
        return main(["check", "demo", f"run.folder={tmp_path}/{folder}"]), " ".join(capsys.readouterr().out.split())

    assert told("new/run")[0] == 0
    code, words = told("file/run")
    assert code == 78 and f"/file/run cannot be made: {tmp_path}/file is no folder; run.folder=DIR" in words
    monkeypatch.setattr("nlscale.verbs.planning.os.access", lambda *_: False)
    code, words = told("new/run")
    assert code == 78 and f"/new/run cannot be made: {tmp_path} lets nobody here write; run.folder=DIR" in words


def test_everything_is_kept_on_the_host_where_nothing_else_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """7B's control, whose only level moves every step, on one GPU; not where its host would have too little memory."""
    run, on = read("7b-plain", ["use.layout=null"]), device("h200")
    best = next(accepted(run, 1, on))
    assert best.run.optim.offload == 1 and best.fits(on) and best.host > 70e9
    assert not any(each.run.optim.offload for each in ranked(run, 8, on))
    little = replace(on, beside=1.5 * best.host)
    assert not any(each.fits(little) for each in ranked(run, 1, little))
    said = ["7b-plain", "--gpus", "1", "--gpu", "h200", "use.layout=null", "optim.offload=1", "train.recompute=block"]
    assert main(["check", *said, "checkpoint.keep=1", "cluster.write=1e9", "cluster.lead=3600"]) in (0, 78)
    assert "in host memory" not in capsys.readouterr().out
    main(["check", "13b-plain", *said[1:]])
    assert "in host memory (optim.offload=1), and a save copies as much again: more than the 214" in " ".join(
        capsys.readouterr().out.split()
    )


def test_layouts_are_ranked_by_what_their_step_takes() -> None:
    run, on = read("7b-hope-attention", ["use.layout=null"]), DEVICES["h100"]
    found = ranked(run, 64, on)
    assert all(each.fits(on) for each in found) and len(found) > 20
    least = min(each.times.step for each in found)
    assert found[0].times.step <= 1.02 * least
    tight = replace(on, memory=12e9)
    assert all(each.resident <= 12e9 for each in ranked(run, 64, tight))
    assert ranked(run, 64, tight)[0].times.step > found[0].times.step
    nothing = ranked(run, 1, replace(on, memory=8e9))
    assert nothing and not nothing[0].fits(on) and nothing[0].resident == min(each.resident for each in nothing)
    for choice in islice(accepted(run, 64, on), 5):
        overrides = [f"{key}={value}" for key, value in choice.differences().items()]
        assert assessed(read("7b-hope-attention", ["use.layout=null", *overrides]), 64, on) == choice
        other = ["use.layout=null", "parallel.tensor=4", "parallel.sequence=true", "train.recompute=block"]
        beside = [f"{key}={value}" for key, value in choice.differences(read("7b-hope-attention", other)).items()]
        assert assessed(read("7b-hope-attention", [*other, *beside]), 64, on) == choice


def test_a_layout_whose_fastest_way_is_refused_has_another() -> None:
    """Masters of matrices that follow Muon cannot lie in host memory: the same layout fits by computing again."""
    run = read(
        "2.7b-hope",
        ["optim.name=muon", "model.base_width=null", "use.layout=null", "model.self_modifying.recompute=true"],
    )
    on = replace(DEVICES["a100"], memory=70e9)
    first, refused = next(accepted(run, 1, on, (1,))), ranked(run, 1, on, (1,))[0]
    assert first.fits(on) and first.run.train.recompute == "block" and not first.run.optim.offload
    with pytest.raises(UserError, match="offload"):
        replace(refused.run)


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        ([], 8),
        (["parallel.tensor=2"], 4),
        (["parallel.tensor=2", "parallel.context=2"], 4),
        (["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=2"], 2),
        (["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=8"], 2),
        (["parallel.tensor=8", "parallel.context=2"], 1),
    ],
)
def test_copies_of_a_node_send_by_all_of_its_links(layout: list[str], count: int) -> None:
    """Against the ranks themselves: neighbours are tensor, then context, then pipeline, then data parallel."""
    run = read("7b-plain", ["use.layout=null", *layout])
    estimate, sides = Estimate(run, 64), (run.parallel.tensor, run.parallel.context, run.parallel.pipeline)
    node = [(rank % sides[0], rank // (sides[0] * sides[1]) % sides[2]) for rank in range(8)]
    assert estimate.together(8) == count == max(node.count(each) for each in node)


def test_slower_links_and_longer_periods_cost_what_they_should() -> None:
    """A network of half the speed doubles the time of levels' traffic; levels that move less send less."""
    plain, levels = (Estimate(read(f"1.3b-{name}", ["use.layout=null"]), 64) for name in ("plain", "hope-attention"))
    on = DEVICES["h100"]
    assert plain.times(replace(on, network=on.network / 2)).data == pytest.approx(2 * plain.times(on).data)
    moved = sum(
        count / {level.name: level.steps for level in levels.run.levels}[name]
        for (_, name), count in levels.held.items()
    )
    ratio = levels.times(on).data / plain.times(on).data
    assert ratio == pytest.approx(moved / sum(plain.held.values())) and ratio < 0.6
    assert levels.times(on).products == pytest.approx(plain.times(on).products)


def test_check_says_by_how_much_it_does_not_fit_and_what_would(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "13b-hope", "--gpus", "8", "--gpu", "h100", "use.layout=null", "checkpoint.keep=1"]) == 78
    said = " ".join(capsys.readouterr().out.split())
    assert "will not do" in said and "more than 73.3; " in said and "would fit (h100)" in said
    assert "cluster.lead=300 s is too short" in said
    assert main(["check", "70b-plain", "--gpus", "8", "--gpu", "h100", "use.layout=null", "checkpoint.keep=1"]) == 78
    said = " ".join(capsys.readouterr().out.split())
    assert "GPUs with parallel." in said


def test_what_check_suggests_works(capsys: pytest.CaptureFixture) -> None:
    """From a layout that is not the default it says what must be taken back, too; for a small GPU, it fits that one."""
    given = ["7b-hope", "--gpus", "8", "--gpu", "h100", "use.layout=null", "checkpoint.keep=1", "cluster.lead=100000"]
    wide = ["parallel.tensor=4", "train.micro_batch=16"]
    main(["check", *given, *wide])
    said = " ".join(capsys.readouterr().out.split())
    words = said.split("more than 73.3; ")[1].split(" would fit")[0].split()
    main(["check", *given, *wide, *words])
    said = capsys.readouterr().out
    assert "memory  " in said and "more than 73.3" not in said
    small = ["125m-plain", "--gpus", "1", "use.layout=null", "cluster.least_gpu_memory=16", "train.micro_batch=16"]
    main(["check", *small])
    said = " ".join(capsys.readouterr().out.split())
    words = said.split("more than 14.7; ")[1].split(" would fit")[0].split()
    main(["check", *small, *words])
    said = capsys.readouterr().out
    assert "memory  " in said and "more than 14.7" not in said


def test_check_refuses_what_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for gpus in ("0", "-2"):
        assert main(["check", "125m-plain", "--gpus", gpus]) == 78 and "must be at least 1" in capsys.readouterr().err
    assert main(["plan", "125m-plain", "--gpus", "1", "--json", str(tmp_path / "no" / "x.json")]) == 78
    assert "--json" in capsys.readouterr().err
    assert main(["plan", "125m-plain", "--gpus", "1", "--gpu", "abacus"]) == 78
    assert "known are a100, h100, h200, b200" in capsys.readouterr().err
    main(["check", "125m-plain", "--gpus", "1", "--json", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["resident"] > found["checkpoint"] / 4 > 0 and found["ok"] == (found["problems"] == [])
    assert found["layout"]["ranks"] == found["layout"]["replicas"] == 1
    assert "held against no GPU's memory; --gpu a100|h100" in capsys.readouterr().out


def test_where_a_layout_does_not_suit_the_gpus_a_table_is_named_that_does(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "7b-hope-attention", "--gpus", "1024", "--gpu", "h100"]) == 78
    said = capsys.readouterr().err
    assert "train.global_batch=256 is no multiple of 512" in said and "use.layout=h100-1024 has a layout for it" in said
    main(["check", "7b-hope-attention", "--gpus", "1024", "--gpu", "h100", "use.layout=h100-1024"])
    assert "= 1,024 ranks" in capsys.readouterr().out
    assert main(["plan", "70b-plain", "--gpus", "4", "--gpu", "h200"]) == 78
    assert "this model has layouts for 64, 512, 1,024 GPUs (use.layout)" in capsys.readouterr().err
    assert main(["check", "1.3b-hope-attention", "--gpus", "7", "--gpu", "h100", "use.layout=h100-1"]) == 78
    assert "this model has layouts for 1, 8, 64, 512, 1,024 GPUs" in capsys.readouterr().err
    for used in ([], ["--use.layout=h100-8"]):  # the table that is in use would help nobody
        assert main(["check", "1.3b-plain", "--gpus", "8", *used, "train.micro_batch=3"]) == 78
        assert "use.layout" not in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--gpus", "64"], *(["--gpus", gpus, "use.layout=null"] for gpus in ("1", "8"))])
def test_check_needs_no_torch_and_no_time(given: list[str]) -> None:
    """Neither where a layout fits nor where one has to be found."""
    lines = f"import sys; from nlscale.cli import main; main(['check', '70b-hope', '--gpu', 'h100', *{given}]); "
    lines += "assert not {'torch', 'deepspeed', 'megatron'} & set(sys.modules), 'torch is there'; import resource; "
    lines += "print('cpu', resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 2.0
    assert "corpora/web is not there yet" in done.stdout and "by formula" in done.stdout


@pytest.mark.matrix
def test_the_largest_plan_takes_a_minute_and_little_memory() -> None:
    """70B on 1,024 ranks with memories that walk each row chunk by chunk, on one core: 60 s and 4 GiB."""
    words = ["plan", "70b-hope", "--gpus", "1024", "use.layout=h100-1024"]
    lines = f"from nlscale.cli import main; main({words}); import resource; "
    lines += "used = resource.getrusage(resource.RUSAGE_SELF); "
    lines += "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)"
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=250, env=alone)
    assert done.returncode == 0, done.stderr
    seconds, gibibytes = map(float, done.stdout.split()[-2:])
    assert seconds < 60 and gibibytes < 4, (seconds, gibibytes)


def test_unknown_devices_are_told_the_known_ones() -> None:
    with pytest.raises(UserError, match="--gpu h300: known are a100, h100, h200, b200"):
        device("h300")


def test_a_plan_is_a_table_and_values(tmp_path: Path) -> None:
    """70B on 1,024 ranks, in a process of its own: under a minute of one core, and 4 GiB."""
    target = tmp_path / "plan.json"
    lines = f"from nlscale.cli import main; code = main(['plan', '70b-plain', '--gpus', '1024', '--json', '{target}', "
    lines += (
        "'use.layout=null', 'parallel.tensor=8', 'parallel.sequence=true', 'parallel.pipeline=8']); import resource; "
    )
    lines += "used = resource.getrusage(resource.RUSAGE_SELF); "
    lines += "print('\\nused', used.ru_utime + used.ru_stime, used.ru_maxrss, code)"
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=240, env=alone)
    assert done.returncode == 0, done.stderr
    seconds, kilobytes, code = map(float, done.stdout.split("\nused")[1].split())
    assert seconds < 60 and kilobytes < 4 * 2**20 and code == 0
    plan = json.loads(target.read_text())
    assert plan["took"] == {
        "seconds": pytest.approx(seconds, abs=1),
        "bytes": pytest.approx(1024 * kilobytes, rel=0.01),
    }
    assert len(plan["memory"]) == 8 and plan["fits"] and len(plan["layouts"]) == 5
    assert plan["parameters"]["all"] == pytest.approx(69.0e9, rel=0.01)
    kept = [stage["activations"] for stage in plan["memory"]]
    assert kept == sorted(kept, reverse=True)
    rows = plan["traffic"]["rows"]
    for size in ("mean", "peak"):
        assert plan["traffic"][size] == pytest.approx(sum(row[size] for row in rows))
    send = {(row["axis"], row["kind"]): row["mean"] for row in rows if row["of"] == "forward, backward"}
    row = 4096 * 8192 * 2 // 8  # bytes of a row's activations on a tensor-parallel rank
    assert send["pipeline", "send"] in (64 * row, 2 * 64 * row)  # forward and back, but at the ends
    assert "best layouts by formula" in done.stdout and "Not measured" in done.stdout and not done.stderr.strip()
