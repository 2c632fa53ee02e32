"""Written rows are read back; the order of the global batches depends on no layout and survives a resume."""

from pathlib import Path

import numpy as np
import pytest

from nlscale.config.cluster import Cluster
from nlscale.config.data import Data, Stream
from nlscale.config.errors import UserError
from nlscale.config.parallel import Parallel
from nlscale.data.batch import HASH_BITS, token_hash
from nlscale.data.card import check_data, load_card
from nlscale.data.loader import HeldOut, Loader
from nlscale.data.verify import verify
from nlscale.data.write import Preparation, prepare
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.corpus import write_corpus


def hashes(
    data: Data, parallel: Parallel, steps: int, start: int, batch: int = 8
) -> tuple[int, list[int], list[bytes]]:
    """(replica, hash of its rows a step, its rows)."""
    world = join(parallel, Cluster(), 0)
    loader = Loader(data, batch, world)
    if start:
        loader.load_state_dict({"step": start, "order": loader.order})
    rows = [next(loader) for _ in range(steps)]
    return world.replica, [token_hash(r) for r in rows], [r.tobytes() for r in rows]


def global_hashes(results: list) -> list[int]:
    by_replica = {replica: values for replica, values, _ in results}
    return [sum(step) % 2**HASH_BITS for step in zip(*by_replica.values(), strict=True)]


def test_same_global_batches_at_every_layout_and_after_a_resume(prepared: str) -> None:
    data = Data(path=prepared, sequence=32)
    rows = load_card(prepared).rows["train"]
    steps = rows // 8 + 5  # into a second epoch
    whole = global_hashes(ranks(1, hashes, data, Parallel(), steps, 0))
    assert len(set(whole)) == steps
    layouts = [(2, Parallel()), (4, Parallel()), (4, Parallel(tensor=2, pipeline=2)), (4, Parallel(context=2))]
    layouts += [(count, Parallel(tensor=n)) for count, n in ((2, 2), (4, 2), (4, 4))]
    layouts += [(count, Parallel(pipeline=n)) for count, n in ((2, 2), (4, 2), (4, 4))]
    for count, parallel in layouts:
        results = ranks(count, hashes, data, parallel, 12, 0)
        assert global_hashes(results) == whole[:12]
        per_replica: dict[int, set] = {}
        for replica, _, batches in results:
            per_replica.setdefault(replica, set()).add(tuple(batches))
        assert all(len(copies) == 1 for copies in per_replica.values()), "ranks of one replica read different rows"
    for start in (3, rows // 8, rows // 8 + 2):
        assert global_hashes(ranks(2, hashes, data, Parallel(), 3, start)) == whole[start : start + 3]


def test_loader_processes_change_nothing(prepared: str) -> None:
    plain = ranks(1, hashes, Data(path=prepared, sequence=32), Parallel(), 6, 2)
    assert ranks(1, hashes, Data(path=prepared, sequence=32, workers=1), Parallel(), 6, 2)[0][1] == plain[0][1]


def test_an_epoch_gives_every_row_once(prepared: str) -> None:
    rows = load_card(prepared).rows["train"]
    ((_, _, batches),) = ranks(1, hashes, Data(path=prepared, sequence=32), Parallel(), rows, 0, 1)
    assert len(set(batches)) == rows


def mixture_counts(data: Data) -> float:
    loader = Loader(data, 8, join(Parallel(), Cluster(), 0))
    rows = np.concatenate([next(loader) for _ in range(60)])
    return float((rows == 1 + ord("#")).any(1).mean())


def test_mixture_keeps_its_weights(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        folder = write_corpus(tmp_path / name, documents=200, space="#" if name == "two" else " ")
        paths.append(str(tmp_path / f"{name}-mds"))
        prepare(Preparation(sources=(str(folder),), out=paths[-1], sequence=32, tokeniser="bytes"))
    data = Data(sequence=32, streams=[Stream(path=paths[0], weight=3), Stream(path=paths[1], weight=1)])
    (marked,) = ranks(1, mixture_counts, data)
    assert marked == pytest.approx(0.25, abs=0.08)


def heldout(data: Data, parallel: Parallel, rows: int) -> tuple[int, list[bytes]]:
    world = join(parallel, Cluster(), 0)
    held, counted = HeldOut(data, rows, 2, world).rows()
    assert len(held) % 2 == 0
    return world.replica, [row.tobytes() for row in held[:counted]]


@pytest.mark.parametrize("rows", [8, 7, 10**6])
def test_held_out_rows_are_the_same_at_every_layout(prepared: str, rows: int) -> None:
    data = Data(path=prepared, sequence=32)
    ((_, whole),) = ranks(1, heldout, data, Parallel(), rows)
    assert len(whole) == min(rows, load_card(prepared).rows["heldout"])
    for count, parallel in ((2, Parallel()), (3, Parallel()), (2, Parallel(tensor=2))):
        dealt = dict(ranks(count, heldout, data, parallel, rows))
        assert sorted(row for rows in dealt.values() for row in rows) == sorted(whole)


def test_another_order_of_rows_is_refused_at_a_resume(prepared: str) -> None:
    with pytest.raises(RuntimeError, match="train.global_batch=8 would work"):
        ranks(1, resumed_with_another_batch, Data(path=prepared, sequence=32))


def resumed_with_another_batch(data: Data) -> None:
    world = join(Parallel(), Cluster(), 0)
    state = Loader(data, 8, world).state_dict()
    Loader(data, 16, world).load_state_dict(state)


def test_verify_names_the_damaged_shard(prepared: str, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    assert verify(str(copy)) == []
    shard = next((copy / "train").rglob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    (fault,) = verify(str(copy))
    assert shard.name in fault and "digest differs" in fault
    shard.unlink()
    assert verify(str(copy))[0].endswith("missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"sequence": 64}, "data.sequence=32 would work"), ({"path": "nowhere"}, "no such folder")],
)
def test_a_dataset_that_does_not_fit_is_refused(prepared: str, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_data(Data(**{"path": prepared, "sequence": 32, **change}), held_out=True)
