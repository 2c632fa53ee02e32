"""Files of columns -> documents: Arrow and Parquet, as Hugging Face's `datasets` keeps and ships them.

Read by pyarrow, a block (record batch, row group) at a time. A folder that `save_to_disk` wrote holds such files beside
descriptions and caches, and may hold several splits: what is read is one of them.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nlscale.config.errors import UserError, require

ERRORS = OSError, ValueError, NotImplementedError  # of pyarrow
ARROW, PARQUET = ".arrow", ".parquet"
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}")  # how such files are named


def of_columns(path: Path | str) -> bool:
    """Whether a file is one, by its name."""
    return str(path).lower().endswith((ARROW, PARQUET))


def chosen(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Of the files below a folder with files of columns: its rows. Raises UserError where they are of several splits."""
    rows = [path for path in files if of_columns(path) and not path.name.startswith("cache-")]
    if (folder / "dataset_dict.json").is_file():
        found = {path.name: str(path) for path in folder.iterdir() if path.is_dir()}
    else:
        named = {shard["split"]: path for path in rows if (shard := SHARD.fullmatch(path.stem))}
        found = {split: f"'{path.parent}/{split}-*{path.suffix}'" for split, path in named.items()}
        if len(found) < 2:
            return rows
    raise UserError(
        f"source '{folder}' holds the splits {', '.join(sorted(found))}; name one of them: "
        f"{found.get('train', min(found.values()))}"
    )


def library(part: str) -> Any:
    """A part of pyarrow; raises UserError where it is not installed."""
    try:
        return importlib.import_module(part)
    except ImportError:
        raise UserError(
            "files of columns (.arrow, .parquet) are read by pyarrow: .venv/bin/pip install pyarrow"
        ) from None


def blocks(path: str) -> int:
    """Blocks of a file; raises UserError where it cannot be read."""
    try:
        return parquet(path).num_row_groups if path.lower().endswith(PARQUET) else sum(1 for _ in batches(path))
    except ERRORS as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def texts(path: str, start: int, stop: int | None, field: str) -> Iterator[str]:
    """The documents of blocks [start, stop), None: to the end. Raises UserError with the place of what is wrong."""
    try:
        yield from read_texts(path, start, stop, field)
    except ERRORS as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_texts(path: str, start: int, stop: int | None, field: str) -> Iterator[str]:
    """As `texts`, with the errors of files as they come."""
    if path.lower().endswith(PARQUET):
        file = parquet(path)
        check(path, file.schema_arrow, field)
        found = (file.read_row_group(i, [field], use_threads=False) for i in range(start, stop or file.num_row_groups))
    else:
        found = (batch for i, batch in enumerate(batches(path)) if start <= i and (stop is None or i < stop))
    for place, block in enumerate(found, start):
        check(path, block.schema, field)
        for row, text in enumerate(block.column(field)):
            said = text.as_py()
            require(said is not None, f"{path} at block {place}, row {row}: '{field}' is null")
            yield said


def check(path: str, schema: Any, field: str) -> None:
    """Raises UserError where the columns hold no such text."""
    names = ", ".join(schema.names)
    require(field in schema.names, f"{path}: no text field '{field}'; name it with --field (there are {names})")
    kinds, kind = library("pyarrow.types"), schema.field(field).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    text = kinds.is_string(kind) or kinds.is_large_string(kind)
    require(text, f"{path}: field '{field}' is {kind}, no text; name another with --field (there are {names})")


def parquet(path: str) -> Any:
    """A Parquet file, its columns still to be read."""
    return library("pyarrow.parquet").ParquetFile(path, memory_map=True)


def batches(path: str) -> Iterator[Any]:
    """The record batches of an Arrow file, mapped; as a stream, which `datasets` writes, or as a file with an index."""
    arrow, ipc = library("pyarrow"), library("pyarrow.ipc")
    with arrow.memory_map(path) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = ipc.open_file(mapped)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            mapped.seek(0)
            yield from ipc.open_stream(mapped)
