"""One cluster for all tests of a session: in CI its absence is a failure, elsewhere a skip that says why."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def machine() -> Iterator[Cluster]:
    """Sixteen nodes, for all tests of a session."""
    if why := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Slurm cluster here: {why}")
    cluster = Cluster(nodes=16, KILLWAIT=8)
    yield cluster
    cluster.down()


@pytest.fixture
def slurm(machine: Cluster) -> Iterator[Cluster]:
    """For one test alone."""
    yield machine
    machine.reset()
