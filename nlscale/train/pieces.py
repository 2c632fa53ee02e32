"""Pieces: the part of a global tensor that a rank holds, as rectangles, in the form that torch's checkpoints ask for.

A shard of optimizer state is a run of a leaf's elements; a run is at most three rectangles of the leaf. Saved as
rectangles of the whole tensor, any layout reads what any other wrote.
"""

import pickle
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType

from nlscale.config.errors import StoppedOnPurpose

Rectangle = tuple[tuple[int, ...], Tensor]  # offset in the global tensor, values (a view)


class Pieces:
    """Rectangles of a global tensor of shape `size`. Only an `owner` writes them; every holder reads them."""

    def __init__(self, size: Sequence[int], rectangles: Sequence[Rectangle], owner: bool) -> None:
        self.shape, self.rectangles, self.owner = torch.Size(size), list(rectangles), owner

    def size(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self.shape

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(offset), i),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offset), values.size()),
                    properties=TensorProperties.create_from_tensor(values),
                    size=self.shape,
                ),
            )
            for i, (offset, values) in enumerate(self.rectangles)
            if self.owner
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), values.size()) for offset, values in self.rectangles]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offset, values in self.rectangles:
            if torch.Size(offset) == index.offset:
                return values
        raise KeyError(f"no rectangle at {index.offset}")


class SavePieces(DefaultSavePlanner):
    """torch's save plan, for states made of Pieces."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The rectangle that a write item names."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class LoadPieces(DefaultLoadPlanner):
    """torch's load plan, for states made of Pieces."""

    def set_up_planner(
        self, state_dict: dict[str, Pieces], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keeps the state as it is: the default walks it for tensors to allocate and drops what it does not know."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator  # type: ignore[assignment]

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The rectangle that a read item fills."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        """Never: a run saves tensors, and torch would unpickle anything else."""
        raise StoppedOnPurpose(f"{read_item.storage_index.fqn} is no tensor")


class Facts(pickle.Unpickler):
    """Reads a checkpoint's .metadata, which torch pickles: of what a pickle may name, only what such a file is made of."""

    ALLOWED: ClassVar[dict[str, tuple[str, ...]]] = {
        "torch.distributed.checkpoint.metadata": (
            *("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata"),
            *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath",),
        "torch": ("Size",),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for anything else."""
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's .metadata")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """torch's reader of a folder, without its unpickling of whatever the folder holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder says of its tensors; raises StoppedOnPurpose where it holds anything else."""
        try:
            with Path(self.path, ".metadata").open("rb") as file:
                found = Facts(file).load()
        except pickle.UnpicklingError as error:
            raise StoppedOnPurpose(f"{self.path}/.metadata was not written by nlscale: {error}") from None
        for item in found.storage_data.values():
            if Path(item.relative_path).name != item.relative_path:
                raise StoppedOnPurpose(f"{self.path}/.metadata leads out of its folder: {item.relative_path}")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Stored(NamedTuple):
    """What a checkpoint says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def stored(folder: Path) -> dict[str, Stored]:
    """The tensors in a checkpoint."""
    facts = Reader(folder).read_metadata().state_dict_metadata
    return {
        name: Stored(tuple(each.size), each.properties.dtype)
        for name, each in facts.items()
        if isinstance(each, TensorStorageMetadata)
    }


def save(pieces: dict[str, Pieces], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes this rank's rectangles. A collective over the group; without torch.distributed, of one process."""
    alone = not dist.is_initialized()
    writer = dcp.FileSystemWriter(folder)
    dcp.save(dict(pieces), storage_writer=writer, planner=SavePieces(), process_group=group, no_dist=alone)


def load(pieces: dict[str, Pieces], folder: Path) -> None:
    """Fills the rectangles in place, whatever layout wrote them. A collective over all ranks, as `save`."""
    planner = LoadPieces(flatten_state_dict=False)
    dcp.load(dict(pieces), storage_reader=Reader(folder), planner=planner, no_dist=not dist.is_initialized())


def rectangles(flat: Tensor, start: int, shape: Sequence[int], base: Sequence[int]) -> Iterator[Rectangle]:
    """The run of elements `start ...` (row-major) of a local tensor of `shape` that lies at `base` in the global one."""
    if len(shape) == 1:
        yield (base[0] + start,), flat
        return
    width, used = shape[1], 0
    while used < len(flat):
        row, column = divmod(start + used, width)
        rows = (len(flat) - used) // width if column == 0 else 0
        count = rows * width if rows else min(width - column, len(flat) - used)
        values = flat[used : used + count].view(max(1, rows), -1)
        yield (base[0] + row, base[1] + column), values
        used += count
