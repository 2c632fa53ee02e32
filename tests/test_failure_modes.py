"""What open multi-frequency and HOPE trainers were seen to get wrong, silently; each held here by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nlscale.cli import main
from nlscale.data.card import check_data
from nlscale.data.loader import Loader
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.corpus import small_run
from tests.optim.driver import LAYOUTS, built, digest, over_replicas, run_steps, state_tensors, usual
from tests.sampled import sampled
from tests.tiny import tiny

SHARDINGS = {
    "zero": [],
    "buffers": ["optim.overlap=true"],
    "eager": ["optim.reduce=eager"],
    "hierarchical": ["optim.reduce=hierarchical", "optim.node=2"],
    "staggered": ["optim.phase=staggered"],
    "nested": ["model.variant=nested"],
    "muon": ["optim.name=muon"],
}


def replicas_agree(overrides: list[str]) -> bool:
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    for step in range(1, 6):
        optimizer.step(step, model.forward_backward(usual(run, step, world), True)[2].long())
        mine = {leaf.name: digest(leaf.value) for leaf in model.leaves}
        if any(other != mine for other in over_replicas(world, mine)):
            return False
    return True


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_replicas_of_every_level_are_equal_after_every_step(sharding: str) -> None:
    assert ranks(4, replicas_agree, SHARDINGS[sharding]) == [True] * 4


def untouched(overrides: list[str]) -> list[str]:
    """Tensors of the levels that moved at step 4 (all of them) that an update left as they were."""
    run = tiny(*overrides)
    world, model, optimizer = built(run)
    for step in range(1, 5):
        before = {name: tensor.clone() for name, tensor in state_tensors(model, optimizer, world).items()}
        optimizer.step(step, model.forward_backward(usual(run, step, world), True)[2].long())
    after = state_tensors(model, optimizer, world)
    weights = [name for name in before if name.startswith(("compute/", "weight/"))]
    return [name for name in weights if torch.equal(before[name], after[name])]


@pytest.mark.parametrize("layout", sampled(["data", "tensor-data", "pipeline-data"], ["data"]))
@pytest.mark.parametrize("sharding", [name for name in SHARDINGS if name != "staggered"])
def test_an_update_moves_every_tensor_of_its_level(sharding: str, layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    node = ["optim.node=1"] if sharding == "hierarchical" else []
    assert ranks(count, untouched, [*overrides, *SHARDINGS[sharding], *node]) == [[]] * count


def test_the_seed_fixes_the_initial_weights() -> None:
    one, same, other = (ranks(1, run_steps, [f"train.seed={seed}"], 0)[0] for seed in (1, 1, 2))
    assert all(torch.equal(one[name][0], same[name][0]) for name in one)
    assert not any(torch.equal(one[name][0], other[name][0]) for name in one if "norm" not in name)


def rows_of_epochs(data: str, folder: Path) -> list[np.ndarray]:
    """This replica's rows over two epochs."""
    run = small_run(data, folder)
    world = join(run.parallel, run.cluster, 0)
    loader = Loader(run.data, run.train.global_batch, world)
    (card,) = check_data(run.data, False)
    steps = card.rows["train"] // run.train.global_batch
    rows = [next(loader) for _ in range(2 * steps)]
    return [np.concatenate(rows[:steps]), np.concatenate(rows[steps:])]


def test_ranks_see_different_rows_and_epochs_differ(prepared: str, tmp_path: Path) -> None:
    (first, second), (other, _) = ranks(2, rows_of_epochs, prepared, tmp_path)
    mine, theirs = ({row.tobytes() for row in rows} for rows in (first, other))
    assert len(mine & theirs) <= 0.05 * len(mine)  # documents of random words may repeat a row by chance
    assert [row.tobytes() for row in first] != [row.tobytes() for row in second]


def test_a_resume_from_nowhere_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "gone" / "config.yaml")
    assert main(["train", nowhere]) == 78
    assert "no recipe" in capsys.readouterr().err
    assert main(["checkpoint", "list", str(tmp_path / "gone")]) == 78
