"""Ranks that do not come, that compute or receive what is wrong, and ports that are taken: named before training starts."""

import os
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from nlscale.config.errors import UserError
from nlscale.config.read import read
from nlscale.runtime import muster
from nlscale.runtime.world import join, leave
from nlscale.testing import ranks


def joined(*overrides: str) -> str:
    run = read("demo", ["parallel.tensor=1", *overrides])
    try:
        join(run.parallel, run.cluster, 0)
    except (RuntimeError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    leave()
    return "joined"


def with_two_more(seconds: float) -> str:
    os.environ.update(WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    return joined(f"cluster.gather={seconds}")


def test_a_rank_that_does_not_come_is_named() -> None:
    began = time.monotonic()
    said = ranks(1, with_two_more, 2.0)[0]
    assert said == "BadHosts: ranks 1, 2 of 3 did not come within 2 s"
    assert 2 <= time.monotonic() - began < 20


def at_port(port: int, size: int) -> list[str]:
    """What becomes of two attempts of the first of so many ranks to meet there."""
    os.environ.update(MASTER_PORT=str(port), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    return [joined() for _ in range(2)]


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        first, again = ranks(1, at_port, holder.getsockname()[1], 2)[0]
    assert first == again
    assert first.startswith("UserError: the port that ranks meet at is taken; another MASTER_PORT would work"), first


def test_a_process_alone_joins_as_often_as_it_likes_whatever_port_it_is_told() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        assert ranks(1, at_port, holder.getsockname()[1], 1) == [["joined", "joined"]]


def test_ranks_knock_until_the_first_one_listens() -> None:
    """And are let in at once; where nobody ever listens, they say where."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
        with pytest.raises(dist.DistNetworkError, match=f"nobody listens at port {port} of 127.0.0.1 after 0.2 s"):
            muster.knock("127.0.0.1", port, 0.2)
        opening = threading.Timer(0.5, door.listen)
        opening.start()
        began = time.monotonic()
        muster.knock("127.0.0.1", port, 60)
        assert 0.4 < time.monotonic() - began < 5
        opening.join()


def broken(what: str) -> str:
    mine = os.environ["RANK"] == "1"
    plain = dist.all_reduce

    def wrong(tensor: torch.Tensor, *rest: object, **more: object) -> None:
        plain(tensor, *rest, **more)
        if mine and what == "sum":
            tensor[17] += 1

    dist.all_reduce = wrong
    if mine and what == "product":
        matmul = torch.Tensor.__matmul__
        torch.Tensor.__matmul__ = lambda self, other: matmul(self, other).index_fill(0, torch.tensor([3]), 1.0)  # type: ignore
    return joined()


@pytest.mark.parametrize(("what", "said"), [("sum", "what reached it of a sum"), ("product", "its matrix product")])
def test_a_rank_that_is_wrong_is_named_on_every_rank(what: str, said: str) -> None:
    host = socket.gethostname()
    assert ranks(3, broken, what) == [f"BadHosts: rank 1 (host {host}): {said} is wrong"] * 3


def test_what_is_multiplied_has_a_closed_form() -> None:
    assert not muster.computes_wrong(torch.device("cpu"))
