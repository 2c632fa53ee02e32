"""Numbers that go wrong: spikes flagged and rolled back, weights of replicas that differ, rows that differ."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlscale.config.errors import StoppedOnPurpose, UserError
from nlscale.config.run import Run
from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train import loop
from nlscale.train.manifest import digest
from nlscale.train.replicas import odd_ranks, weights_hash
from nlscale.train.spikes import z_score
from tests.corpus import small_run
from tests.records import events, lines, shards

SMALL = ["model.layers=2", "train.steps=50", "checkpoint.interval=6", "checkpoint.keep=0"]


def test_z_score_is_that_of_a_normal_distribution_and_no_outlier_moves_it() -> None:
    chance = random.Random(1)
    before = [chance.gauss(3.0, 0.1) for _ in range(64)]
    assert z_score(3.5, before) == pytest.approx(5.0, rel=0.35)
    assert z_score(3.5, [*before[:-3], 90.0, 90.0, 90.0]) == pytest.approx(z_score(3.5, before), rel=0.3)
    assert z_score(3.5, before[:31]) == 0.0 and z_score(2.0, before) < 0.0
    assert z_score(2.01, [2.0] * 64) == pytest.approx(5.0)  # a loss that stands still has no deviation of its own


def spoiled(run: Run, at: list[int]) -> str:
    """Trains; after each of these steps, as they come, all weights are others by far, on every rank."""
    plain, left = loop.train_step, list(at)

    def step(state: Any, *rest: Any) -> Any:
        if left and state.step == left[0]:
            left.pop(0)
            state.optimizer.arrive()
            for mover in state.optimizer.movers.values():
                for shard in mover.shards:
                    for fragment in state.optimizer.fragments(shard):
                        fragment.values["weight"].mul_(-30)
            state.optimizer.publish()
        return plain(state, *rest)

    loop.train_step = step
    try:
        loop.train(run)
    except (UserError, StoppedOnPurpose) as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def test_a_spike_is_flagged_and_the_run_goes_on(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", *SMALL)
    assert ranks(1, spoiled, run, [40]) == ["finished"]
    first = events(run, "spike")[0]
    assert first["step"] == 41 and first["z"] > 10 and first["loss"] == lines(run)[40]["train/loss"]
    assert events(run, "rollback") == [] and len(lines(run)) == 50


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2"],
        pytest.param(["optim.reduce=eager"], marks=pytest.mark.matrix),
        pytest.param(["optim.overlap=true"], marks=pytest.mark.matrix),
        pytest.param([], marks=pytest.mark.slow),
    ],
)
def test_a_spike_is_rolled_back_and_its_rows_are_passed_over(layout: list[str], prepared: str, tmp_path: Path) -> None:
    """From the checkpoint on it is, to the bit, the run that a fresh start from there makes with the later rows.

    Step 36 leaves windows open that were empty at step 40's place, and the other way round.
    """
    run = small_run(prepared, tmp_path / "run", *SMALL, "train.on_spike=rollback", *layout)
    assert ranks(2, spoiled, run, [40]) == ["finished"] * 2
    (back,) = events(run, "rollback")
    assert (back["step"], back["reached"], back["rows_passed_over"]) == (36, 41, 20)
    told = [line["step"] for line in lines(run)]
    assert told == list(range(1, 51))
    fresh = small_run(prepared, tmp_path / "fresh", *SMALL, *layout)
    there, here = (Folder(Path(each.folder)).checkpoint(36) for each in (run, fresh))
    shutil.copytree(there, here)
    facts = json.loads((here / "train_state.json").read_text())
    assert facts["loader"]["step"] == 36
    facts["loader"]["step"] = 41
    (here / "train_state.json").write_text(json.dumps(facts))
    manifest = json.loads((here / "manifest.json").read_text())
    manifest["files"]["train_state.json"] = digest(here / "train_state.json")
    (here / "manifest.json").write_text(json.dumps(manifest))
    ranks(2, loop.train, fresh)
    for name in ("train/loss", "data/token_hash", "tokens"):
        assert [line[name] for line in lines(run)[36:]] == [line[name] for line in lines(fresh)]
    assert shards(run, 50) == shards(fresh, 50) and shards(run, 42) == shards(fresh, 42)


def test_a_run_that_spikes_again_and_again_is_given_up(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", *SMALL, "train.on_spike=rollback")
    (said,) = ranks(1, spoiled, run, [40, 40, 40])
    assert "StoppedOnPurpose: the loss rose 3 times after the checkpoint of step 36" in said
    assert [line["step"] for line in events(run, "rollback")] == [36] * 3


def test_a_hash_of_weights_sees_every_bit() -> None:
    chance = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(37, 29, generator=chance).to(dtype)
        usual = weights_hash([values, values[:3]])
        assert torch.equal(weights_hash([values.clone(), values[:3].clone()]), usual)
        words = values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
        seen = 0
        for place in torch.randint(0, 29 * 37, (200,), generator=chance).tolist():
            words.view(-1)[place] ^= 1
            seen += not torch.equal(weights_hash([values, values[:3].clone()]), usual)
            words.view(-1)[place] ^= 1
        assert seen == 200
        swapped = values.clone()
        swapped[[0, 1]] = swapped[[1, 0]]
        assert not torch.equal(weights_hash([swapped, values[:3]]), usual)


def test_the_majority_says_who_is_odd() -> None:
    assert odd_ranks([(0, 5), (1, 7), (0, 5), (1, 7), (0, 6), (1, 7)]) == [4]
    assert odd_ranks([(0, 5), (0, 6)]) == [0, 1] and odd_ranks([(0, 5), (1, 6)]) == []


def with_a_flipped_bit(run: Run, rank: int, name: str) -> None:
    """Trains; after step 6 a bit of some weights of one rank is another."""
    plain = loop.train_step

    def step(state: Any, *rest: Any) -> Any:
        report = plain(state, *rest)
        if state.step == 6 and int(os.environ["RANK"]) == rank:
            state.optimizer.arrive()
            (leaf,) = (leaf for leaf in state.leaves if leaf.name == name)
            leaf.value.view(torch.int32)[..., 3] ^= 1 << 12
        return report

    loop.train_step = step
    loop.train(run)


@pytest.mark.parametrize(
    ("count", "rank", "name", "layout", "odd"),
    [
        (4, 2, "blocks.0.mix.q.weight", ["train.micro_batch=1"], "rank 2"),
        (4, 3, "blocks.1.mix.norm.weight", ["parallel.tensor=4"], "rank 3"),
        (2, 1, "blocks.0.continuum.long.down.weight", [], "rank 0"),
    ],
)
def test_the_rank_whose_weights_differ_is_named(
    count: int, rank: int, name: str, layout: list[str], odd: str, prepared: str, tmp_path: Path
) -> None:
    """By the majority, where there is one; nothing of it is saved."""
    same = ["train.compare=6", "optim.weight_decay=0", "model.kv_heads=4"]
    run = small_run(prepared, tmp_path / "run", *SMALL, *same, *layout)
    with pytest.raises(
        RuntimeError, match=rf"step 6: the weights of {odd} \(host .*are not those of the other replicas"
    ):
        ranks(count, with_a_flipped_bit, run, rank, name)
    (found,) = events(run, "weights differ")
    assert len(found["ranks"]) == (2 if count == 2 else 1) and Folder(Path(run.folder)).steps() == []


def with_other_rows(run: Run) -> None:
    """Trains; rank 1 reads another token at step 4, as from a damaged copy that nothing audits."""
    plain = loop.train_step

    def step(state: Any, *rest: Any) -> Any:
        if state.step == 3 and os.environ["RANK"] == "1":
            rows = next(state.loader).copy()
            rows[0, 7] ^= 1
            state.loader.iterator = iter([np.asarray(rows)])
        return plain(state, *rest)

    loop.train_step = step
    loop.train(run)


def test_ranks_of_a_replica_that_read_different_rows_end_the_run(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", *SMALL, "parallel.tensor=2")
    with pytest.raises(RuntimeError, match="step 4: ranks of one replica read different rows"):
        ranks(2, with_other_rows, run)
    assert len(lines(run)) == 3
