"""What one pretended rank holds and sends: every storage from its first tensor to its last, every collective."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nlscale.runtime.wire import Axes


class Ledger(TorchDispatchMode):
    """Bytes of live storages and their peak; the bytes of collectives by axis and kind."""

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.wire = Axes(axes)
        self.sizes: dict[int, int] = {}  # by a storage's address
        self.live = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.wire.note(function, args)
        result = function(*args, **(kwargs or {}))
        if function.namespace != "c10d":
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.hold(tensor)
        return result

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        """A storage's last tensor is gone."""
        self.live -= self.sizes.pop(key)

    def restart(self) -> None:
        """Forgets peaks and traffic so far; what is live stays."""
        self.peak = self.live
        self.wire.bytes.clear()


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages of some tensors, each once."""
    return {each._cdata: each.nbytes() for each in (tensor.untyped_storage() for tensor in tensors)}
