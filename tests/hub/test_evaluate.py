"""`nlscale eval`: the run's own held-out loss, again and by place; longer rows; memory tasks."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.config.errors import UserError
from nlscale.config.run import Run
from nlscale.data.write import Preparation, prepare
from nlscale.hub import evaluate
from nlscale.hub.evaluate import Evaluation, by_place, held_out, mean, stride
from nlscale.hub.heard import answers, losses
from nlscale.runtime.folder import read_lines
from nlscale.tasks import TASKS
from nlscale.tasks.trial import Material
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.hub.test_generate import KINDS
from tests.model.test_mixing import CHUNKS, built
from tests.tiny import tiny
from tests.told import told

SHORT = [
    "train.steps=8",
    "checkpoint.interval=4",
    "train.evaluate_rows=6",
    "train.evaluate_interval=4",
    "optim.lr=0.01",
]


@pytest.fixture(scope="module")
def trained(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    runs = {}
    for kind, said in KINDS.items():
        runs[kind] = small_run(prepared, tmp_path_factory.mktemp(kind), *SHORT, *said)
        ranks(runs[kind].parallel.ranks, train, runs[kind])
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_runs_own_held_out_loss(kind: str, trained: dict[str, Run], tmp_path: Path) -> None:
    run, file = trained[kind], tmp_path / "loss.json"
    lines = read_lines(Path(run.folder) / "metrics.jsonl")
    known = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    for step in (4, 8):
        said = told("eval", run.folder, "--step", str(step), "--json", str(file))
        found = json.loads(file.read_text())
        assert said.code == 0 and found["rows"] == 6 and found["step"] == step
        assert abs(found["loss"] - known[step]) < 1e-5
        assert f"loss {found['loss']:.4f}" in said.out and "29 to 32" in said.out
        assert abs(sum(part["loss"] for part in found["by_place"]) / 8 - found["loss"]) < 1e-9
    assert known[4] > known[8]


def test_a_level_may_learn_while_it_is_read_though_it_did_not_in_training(
    trained: dict[str, Run], tmp_path: Path
) -> None:
    """By an override; where nothing may be written, it says what the run says."""
    moves = (
        "levels=[{name: fast, period: 8, unit: token, width: 0.5}, {name: slow, period: 4, width: 0.25}, "
        "{name: long, period: 8, width: 0.25}]"
    )
    found = []
    for said in ([], [moves, "model.inner.lr=1.0"], [moves, "model.inner.lr=1.0", "model.writes=false"]):
        assert told("eval", trained["hope-attention"].folder, "--json", str(tmp_path / "loss.json"), *said).code == 0
        found.append(json.loads((tmp_path / "loss.json").read_text())["loss"])
    usual, learning, still = found
    assert abs(still - usual) < 1e-6 and abs(learning - usual) > 1e-4


def test_longer_rows_are_those_that_follow_one_another(trained: dict[str, Run], tmp_path: Path) -> None:
    file = tmp_path / "loss.json"
    said = told("eval", trained["hope"].folder, "--longer", "3", "--rows", "4", "--json", str(file))
    found = json.loads(file.read_text())
    assert said.code == 0 and found["sequence"] == 96 and found["rows"] == 4
    assert [part["last"] for part in found["by_place"]] == [12, 24, 36, 48, 60, 72, 84, 96]
    far = told("eval", trained["hope"].folder, "--longer", "5000")
    assert far.code == 78 and "a smaller --longer would work" in far.err


class Split:
    """Held-out rows of two units: 0 to 2 and 3 to 7 follow one another, 3 does not follow 2."""

    num_samples = 8

    def __getitem__(self, row: int) -> dict:
        return {"tokens": np.arange(5) + 4 * row + 100 * (row >= 3)}


@pytest.mark.parametrize(("longer", "begin"), [(2, [0, 116, 124]), (4, [116]), (3, [0, 112])])
def test_rows_are_joined_where_one_goes_on_with_the_last_token_of_the_other(
    longer: int, begin: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "open_rows", lambda *_: Split())
    found = held_out(SimpleNamespace(run=tiny()), None, Evaluation(rows=9, longer=longer))  # type: ignore[arg-type]
    assert sorted(found[:, 0].tolist()) == begin
    assert (np.diff(found, axis=1) == 1).all() and found.shape[1] == 4 * longer + 1


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of rows of 32 bytes, many of them different."""
    root = tmp_path_factory.mktemp("varied")
    texts = np.random.default_rng(0).integers(40, 120, (200, 60), dtype=np.uint8)
    lines = [json.dumps({"text": text.tobytes().decode()}) for text in texts]
    (root / "text.jsonl").write_text("\n".join(lines) + "\n")
    source, out = str(root / "text.jsonl"), str(root / "out")
    prepare(Preparation(sources=(source,), out=out, sequence=32, tokeniser="bytes", held_out=0.2))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_of_a_trained_run(kind: str, trained: dict[str, Run], varied: str, tmp_path: Path) -> None:
    """Of all three kinds of readers, one on two ranks: each line is printed as it stands in the file."""
    file = tmp_path / "tasks.json"
    given = [trained[kind].folder, f"data.path={varied}", "--rows", "6", "--json", str(file)]
    said = told("eval", *given, "--tasks", "all")
    lines = json.loads(file.read_text())["tasks"]
    assert said.code == 0 and list(dict.fromkeys(line["task"] for line in lines)) == list(TASKS)
    for line in lines:
        assert 0 < line["loss"] < 20 and line["answers"] >= 6
        assert (line["right"] is None) == (line["guessed"] is None)
        shown = next(each for each in said.out.splitlines() if each.startswith(line["asked"] + "  "))
        assert f"{line['loss']:8.4f}" in shown
        assert line["right"] is None or f"{line['right']:.1%}" in shown
    assert told("eval", *given, "--tasks", "needle").code == 0
    assert json.loads(file.read_text())["tasks"] == [line for line in lines if line["task"] == "needle"]


def test_mistakes_are_one_line(trained: dict[str, Run]) -> None:
    for given, answer in (
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--longer", "0"], "--longer 0 must be at least 1"),
        (["--tasks", "recal"], "--tasks recal: known are recall, needle, shift, adaptation, continual, states; or all"),
        (["--tasks", "all"], "--tasks needs 32 different tokens, and the held-out rows have"),
        (["--tasks", "recall", "--rows", "3"], "--tasks needs 4 held-out rows, and has 3; a larger --rows would do"),
        (["data.sequence=64"], "holds rows of 32 tokens, but data.sequence=64; data.sequence=32 would work"),
        (["--json", "/nowhere/at/all"], "--json /nowhere/at/all: No such file"),
    ):
        said = told("eval", trained["hope"].folder, *given)
        assert said.code == 78 and answer in said.err and len(said.err.splitlines()) == 1


def by_hand(run: Run) -> tuple[Tensor, Tensor]:
    """Losses of rows that are read in parts, and of the same rows at once; some targets count for nothing."""
    model, _ = built(run)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 128, (5, 17), generator=generator)
    starts, targets = tokens[:, :-1] < 12, tokens[:, 1:].clone()
    targets[1, :9] = -1
    found = losses(model, tokens[:, :-1], targets, starts, 2, 5)
    heard: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: heard.append(given[0].detach()))
    with torch.no_grad():
        total = model(tokens[:, :-1], targets, starts)
        logits = model.head.norm(heard[0]) @ model.head.weight.t()
    each = F.cross_entropy(logits.permute(1, 2, 0), targets, reduction="none", ignore_index=-1)
    assert torch.isclose(each.sum(), total)
    assert abs(mean(found) - float(total) / int((targets >= 0).sum())) < 1e-10
    return found, each.masked_fill(targets < 0, torch.nan)


@pytest.mark.parametrize("said", ["", "model.mixer=self_modifying"])
def test_losses_of_parts_are_those_of_rows(said: str) -> None:
    ((found, each),) = ranks(1, by_hand, tiny(*CHUNKS, *said.split()))
    torch.testing.assert_close(found, each, rtol=1e-10, atol=1e-12, equal_nan=True)


def asked_by_hand(run: Run) -> tuple[Tensor, Tensor]:
    """What a network answers to needles, and what its scores of whole rows say."""
    model, _ = built(run)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 128, (5, 17), generator=generator)
    trial = TASKS["needle"].made(Material(text, 0, generator))[0]
    loss, right = answers(model, trial, 2, 16)
    assert right is not None and trial.choices_BTK is not None
    heard: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: heard.append(given[0].detach()))
    targets, starts = trial.targets_BT, torch.zeros_like(trial.tokens_BT, dtype=torch.bool)
    with torch.no_grad():
        model(trial.tokens_BT, targets, starts)
        logits = (model.head.norm(heard[0]) @ model.head.weight.t()).transpose(0, 1)
    found = []
    for b, t in (trial.asked_BT >= 0).nonzero().tolist():
        best = max(trial.choices_BTK[b, t].tolist(), key=lambda token: float(logits[b, t, token]))
        found.append([float(-logits[b, t].log_softmax(0)[targets[b, t]]), float(best == targets[b, t])])
    here = trial.asked_BT >= 0
    assert len(found) == 20 and not right[~here].any() and loss[~here].isnan().all()
    return torch.stack([loss[here], right[here].double()], 1), torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("said", ["", "model.mixer=self_modifying"])
def test_answers_are_the_likeliest_of_the_choices(said: str) -> None:
    ((found, each),) = ranks(1, asked_by_hand, tiny(*CHUNKS, "data.sequence=64", *said.split()))
    torch.testing.assert_close(found, each, rtol=1e-10, atol=1e-12)
    assert 0 < found[:, 1].mean() < 1


def test_rows_that_cannot_be_trusted_are_no_part_of_a_mean() -> None:
    each = torch.tensor([[1.0, 3.0], [torch.nan, torch.nan]])
    assert mean(each) == 2 and [part["loss"] for part in by_place(each)] == [1, 3]
    with pytest.raises(UserError, match="nothing is left to evaluate"):
        mean(each[1:])


@pytest.mark.parametrize(("count", "rows"), [(10, 3), (12, 4), (7, 7), (5, 64), (1, 1), (100, 8)])
def test_longer_rows_are_spread_over_the_split(count: int, rows: int) -> None:
    places = [place * stride(count, rows) % count for place in range(count)]
    assert sorted(places) == list(range(count))
    some = sorted(places[:rows])
    assert all(b - a <= 2 * stride(count, rows) for a, b in zip(some, some[1:], strict=False))


def test_the_parts_of_a_row_hold_all_of_it() -> None:
    each = torch.arange(20.0).view(1, 20)
    parts = by_place(each)
    assert [part["first"] for part in parts] == [1, *(part["last"] + 1 for part in parts[:-1])]
    assert parts[-1]["last"] == 20 and parts[0] == {"first": 1, "last": 2, "loss": 0.5}
    assert len(by_place(each[:, :3])) == 3
