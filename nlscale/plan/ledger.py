"""What one pretended rank holds and sends: every storage from its first tensor to its last, every collective."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, UntypedStorage

from nlscale.runtime.wire import Axes


class Ledger:
    """Bytes of live storages and their peak; the bytes of collectives by axis and kind."""

    def __init__(self) -> None:
        self.wire = Axes({})
        self.held: dict[int, tuple[int, weakref.ref[UntypedStorage]]] = {}  # by a storage's address: its bytes
        self.live = self.peak = 0

    def follow(self, axes: Mapping[str, str]) -> None:
        """From now on, what is sent counts for the axes of these groups."""
        self.wire = Axes(axes)

    def note(self, function: Any, args: Any, result: Any) -> None:
        """Counts what an operation sent, and what it gave."""
        if function.namespace == "c10d":
            self.wire.note(function, args)
        elif isinstance(result, Tensor):
            self.hold(result)
        elif isinstance(result, tuple | list):
            for each in result:
                self.note(function, args, each)

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            size = storage.nbytes()
            self.held[key] = size, weakref.ref(storage, lambda _: self.free(key))
            self.live += size
            self.peak = max(self.peak, self.live)

    def free(self, key: int) -> None:
        """A storage's last tensor is gone."""
        self.live -= self.held.pop(key)[0]

    def restart(self) -> None:
        """Forgets peaks and traffic so far; what is live stays."""
        self.peak = self.live
        self.wire.bytes.clear()


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages of some tensors, each once."""
    return {each._cdata: each.nbytes() for each in (tensor.untyped_storage() for tensor in tensors)}
