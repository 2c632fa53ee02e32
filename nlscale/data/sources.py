"""Files -> documents: text (one document a file) and JSON lines, plain, .gz or .zst; files of columns (columns.py)."""

import glob
import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import zstandard

from nlscale.config.errors import UserError, require
from nlscale.data import columns

UNIT = 2**24  # bytes of source that one unit of work covers, at most where files can be cut
SMALLEST_UNIT = 2**20
STDLIB = "stdlib"  # the sources of this Python's standard library
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "__pycache__"}
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json", ".gz", ".zst", columns.ARROW, columns.PARQUET)


@dataclass(frozen=True)
class Piece:
    """A file; or the lines of a plain JSON-lines file that begin in bytes [start, stop), or such blocks of columns."""

    path: str
    size: int
    start: int = 0
    stop: int | None = None


def expand(sources: Sequence[str]) -> list[Path]:
    """Files named by paths, folders, globs or the word stdlib, sorted; raises UserError for one that names nothing."""
    found: set[Path] = set()
    for source in sources:
        require(bool(source), "a source is a path, a folder, a glob or the word stdlib, not empty")
        if source == STDLIB and not Path(source).exists():
            root = Path(sysconfig.get_paths()["stdlib"])
            files = [p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts)]
        elif Path(source).is_dir():
            files = [p for p in Path(source).rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES)]
            if any(map(columns.of_columns, files)):
                files = columns.chosen(Path(source), files)
        else:
            files = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
        require(bool(files), f"source '{source}' names no file that can be read as text or JSON lines")
        found.update(files)
    return sorted(found)


def units(files: Sequence[Path]) -> list[list[Piece]]:
    """Pieces of work of about equal size; they depend on the files alone, so that a restart finds the same ones."""
    sizes = {path: path.stat().st_size for path in files}
    limit = min(UNIT, max(SMALLEST_UNIT, sum(sizes.values()) // 16))
    pieces: list[Piece] = []
    for path, size in sizes.items():
        if path.name.lower().endswith(".jsonl") and size > limit:
            cuts = [*range(0, size, limit), size]
            pieces += [Piece(str(path), b - a, a, b) for a, b in pairwise(cuts)]
        elif columns.of_columns(path) and size > limit:
            count, parts = columns.blocks(str(path)), -(-size // limit)
            cuts = sorted({part * count // parts for part in range(parts + 1)})
            pieces += [Piece(str(path), size * (b - a) // count, a, b) for a, b in pairwise(cuts)]
        elif size:
            pieces.append(Piece(str(path), size))
    require(bool(pieces), "the sources are empty: all files have 0 bytes")
    grouped: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if filled and filled + piece.size > limit:
            grouped.append([])
            filled = 0
        grouped[-1].append(piece)
        filled += piece.size
    return grouped


def documents(piece: Piece, field: str) -> Iterator[str]:
    """The piece's documents; `field` holds the text of a JSON line. Raises UserError with the place of what is wrong."""
    if columns.of_columns(piece.path):
        yield from columns.texts(piece.path, piece.start, piece.stop, field)
        return
    try:
        yield from read_documents(piece, field)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{piece.path} cannot be read: {error}") from None


def read_documents(piece: Piece, field: str) -> Iterator[str]:
    """As `documents`, with the errors of files and compression as they come."""
    name = piece.path.lower().removesuffix(".gz").removesuffix(".zst")
    with opened(piece.path) as stream:
        if not name.endswith((".jsonl", ".json")):
            yield decoded(stream.read(), piece.path)
            return
        if piece.start:
            stream.seek(piece.start - 1)
            stream.readline()  # the line that began before is another piece's
        while piece.stop is None or stream.tell() < piece.stop:
            place, line = f"{piece.path} at byte {stream.tell()}", stream.readline()
            if not line:
                return
            if line.strip():
                yield parsed(line, place, field)


class Frames(io.RawIOBase):
    """What a .zst file holds in all its frames; raises EOFError where it ends inside one."""

    def __init__(self, path: str) -> None:
        self.file, self.rest, self.made, self.given = open(path, "rb"), b"", memoryview(b""), 0
        self.frame: Any = None  # one that has begun and not ended

    def readable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Decompressed bytes so far."""
        return self.given

    def close(self) -> None:
        """And the file."""
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """The next bytes; 0 at the end of the last frame."""
        while not self.made:
            packed = self.rest or self.file.read(io.DEFAULT_BUFFER_SIZE * 8)
            if not packed:
                if self.frame is not None:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.made, self.rest = memoryview(self.frame.decompress(packed)), b""
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.made))
        buffer[:count], self.made, self.given = self.made[:count], self.made[count:], self.given + count
        return count


def opened(path: str) -> IO[bytes]:
    """The file's bytes, decompressed by its suffix."""
    if path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    if path.lower().endswith(".zst"):
        return io.BufferedReader(Frames(path))
    return open(path, "rb")


def decoded(content: bytes, place: str) -> str:
    """UTF-8 text."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8: byte {content[error.start]:#04x} at {error.start}") from None


def parsed(line: bytes, place: str, field: str) -> str:
    """The text of one JSON line."""
    try:
        record = json.loads(decoded(line, place))
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not a JSON line ({error.msg})") from None
    require(
        isinstance(record, dict) and isinstance(record.get(field), str),
        f"{place}: no text field '{field}'; name it with --field"
        + (f" (the line has {', '.join(map(str, record))})" if isinstance(record, dict) else ""),
    )
    text = str(record[field])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: character {error.start} of '{field}' is half of a surrogate pair") from None
    return text
