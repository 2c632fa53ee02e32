"""The names under which a node's ranks share memory through mosaicml-streaming."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nlscale.data.mds import prefix
from nlscale.runtime.alone import of_first
from nlscale.runtime.world import World


@contextmanager
def one_name(world: World) -> Iterator[None]:
    """Within it streaming takes on all ranks of a node the free name that the first of them found.

    By itself every rank looks, and where another job ends between two looks they find different ones: the start fails.
    """
    look = prefix._check_and_find_retrying

    def found(*args: Any, **options: Any) -> int:
        return of_first(look(*args, **options), world)

    prefix._check_and_find_retrying = found
    try:
        yield
    finally:
        prefix._check_and_find_retrying = look
