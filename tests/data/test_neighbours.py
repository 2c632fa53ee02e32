"""Jobs that start at the same moment on one machine do not meet in streaming's shared memory."""

import fcntl
import os
import tempfile
import time
from pathlib import Path

import pytest
from nlscale_launch.local import free_port

from nlscale.config.cluster import Cluster
from nlscale.config.data import Data
from nlscale.config.parallel import Parallel
from nlscale.data.loader import Loader
from nlscale.data.mds import prefix
from nlscale.data.rows import open_rows
from nlscale.runtime.alone import acquire, alone_on_node, lock_file
from nlscale.runtime.world import join
from nlscale.testing import ranks


def opens(data: Data, times: int) -> list[bytes]:
    """A job of one rank that opens the same rows again and again, and reads."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_PORT=str(free_port()))
    world = join(Parallel(), Cluster(), 0)
    return [next(Loader(data, 4, world)).tobytes() for _ in range(times)]


def test_jobs_that_open_at_once(prepared: str) -> None:
    found = ranks(4, opens, Data(path=prepared, sequence=32), 5)
    assert {row for job in found for row in job} == {found[0][0]}


def differ(data: Data) -> bytes:
    """A rank of a job that finds another name free than its neighbour, as when a third job ends between their looks."""
    found = prefix._check_and_find
    prefix._check_and_find = lambda *args: found(*args) + int(os.environ["RANK"])
    world = join(Parallel(), Cluster(), 0)
    return next(Loader(data, 4, world)).tobytes()


def test_ranks_that_find_different_names_take_the_first_ones(prepared: str) -> None:
    one, other = ranks(2, differ, Data(path=prepared, sequence=32))
    assert len(one) == len(other) and one != other  # each its replica's share of the rows


def waits(data: Data) -> float:
    """Seconds that a job took to open its rows."""
    world = join(Parallel(), Cluster(), 0)
    began = time.monotonic()
    open_rows(data, "train", world, 2, False)
    return time.monotonic() - began


def held(seconds: float) -> int:
    """A process that holds the lock for a while and dies with it; its id, once it has it."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with lock_file().open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.write(told, b"x")
            time.sleep(seconds)
            os._exit(0)
    os.read(ready, 1)
    return child


@pytest.fixture
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other test's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.usefixtures("own_lock")
def test_one_waits_for_the_other_and_for_no_dead_one(prepared: str) -> None:
    child = held(2.0)
    took = ranks(1, waits, Data(path=prepared, sequence=32))[0]
    os.waitpid(child, 0)
    assert took > 0.3
    assert ranks(1, waits, Data(path=prepared, sequence=32))[0] < took


@pytest.mark.usefixtures("own_lock")
def test_after_a_while_it_goes_on_without() -> None:
    child = held(1.5)
    with lock_file().open("a") as file:
        assert not acquire(file.fileno(), 0.2)
    with alone_on_node(0, 0.1):
        pass
    os.waitpid(child, 0)
    with lock_file().open("a") as file:
        assert acquire(file.fileno(), 0.2)
