"""Imports are paid here once; ranks are forked from this process."""

import os
import sys
from collections.abc import Iterator

import torch

if "gpu" not in sys.argv:  # read once, when triton is first imported: but for `-m gpu`, kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from nlscale.config.read import read  # noqa: E402
from nlscale.runtime.quiet import quiet  # noqa: E402

quiet()

import pytest  # noqa: E402

if "gpu" not in sys.argv:  # what one GPU needs is torch, Triton, megatron-core and a few small packages (`make gpu`)
    import nlscale.runtime.world  # noqa: I001
    import nlscale.optim.zero  # noqa: F401

read("demo")  # the schema of a config is made once in a process
torch.set_num_threads(1)  # a pool of OpenMP threads in this process would hang in the ranks forked from it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark, target in (("slow", "faults"), ("matrix", "matrices")):
            if item.get_closest_marker(mark) and mark not in item.config.getoption("-m"):
                item.add_marker(pytest.mark.skip(reason=f"`make {target}` runs it"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
        elif item.get_closest_marker("gpu") and os.environ.get("TRITON_INTERPRET") == "1":
            item.add_marker(pytest.mark.skip(reason="`pytest -m gpu` runs it: here triton interprets"))


@pytest.fixture(scope="session", autouse=True)
def _no_curves() -> Iterator[None]:
    """A loss curve takes a second, and hundreds of runs are trained here: tests/train/test_curve.py and test_cli.py draw."""
    if "gpu" in sys.argv:
        yield
        return
    from nlscale.train.curve import Curve

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curve, "draw", lambda self: None)
        yield


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of rows of 32 bytes."""
    from nlscale.data.write import Preparation, prepare
    from tests.corpus import write_corpus

    root = tmp_path_factory.mktemp("rows")
    source = write_corpus(root / "in")
    plan = Preparation(sources=(str(source),), out=str(root / "out"), sequence=32, tokeniser="bytes", held_out=0.1)
    prepare(plan)
    return str(root / "out")
