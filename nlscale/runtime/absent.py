"""What our libraries import for parts of theirs that nobody here uses. Each costs a start up to three seconds.

mosaicml-streaming takes transformers and torchvision for its ready-made datasets (and torchvision's wheels, built for CUDA,
die beside a CPU torch: whoever wants transformers' models there must declare its operators); megatron-core takes wandb for
its own training loop, and, as DeepSpeed does with its Muon, hands functions to torch.compile as it is imported, which brings
dynamo and inductor.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch


class Absent(ModuleType):
    """A package whose every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder(MetaPathFinder, Loader):
    """Finds an empty package under the names given and below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A module of such a package."""
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty one."""
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """Meanwhile, who imports these packages gets empty ones; afterwards, the real ones. One that is loaded already stays."""
    names = tuple(name for name in names if name not in sys.modules)
    finder = Finder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [each for each in sys.modules if each.split(".")[0] in names]:
            del sys.modules[name]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Meanwhile, torch.compile leaves functions as they are."""
    compiling = torch.compile
    torch.compile = lambda model=None, **_: model or (lambda given: given)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiling
