"""Preparing a dataset: documents -> tokens -> packed rows of T + 1 tokens -> MDS shards with digests.

Packing happens here so that training reads rows and its resume point is one number. Work is cut into units; each unit is
written by one process into a staging folder and marked when it is done, so a killed preparation goes on where it was.
The staging folder becomes the dataset by one rename.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from nlscale.config.errors import UserError, require
from nlscale.data.card import NAME, SPLITS, TOKENISER, Card, load_card, save_card
from nlscale.data.mds import COLUMN, DIGEST, merge, row_type, writer
from nlscale.data.sources import Piece, documents, expand, units
from nlscale.data.tokenise import Tokeniser, make
from nlscale.runtime.progress import progress

TEXTS = 256  # documents tokenised at once


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to prepare, and how."""

    sources: tuple[str, ...]
    out: str
    sequence: int = 2048
    tokeniser: str = "bpe:32768"
    held_out: float = 0.02  # share of the documents
    field: str = "text"  # of a JSON line
    shard_bytes: int = 2**26
    workers: int = 0  # processes; 0: one a core


@dataclass(frozen=True)
class Unit:
    """One process's piece of work and where its rows go."""

    index: int
    pieces: list[Piece]
    folder: Path
    plan: Preparation
    tokeniser: Tokeniser

    @property
    def name(self) -> str:
        """Folder of the unit's shards inside a split."""
        return f"unit-{self.index:05d}"

    @property
    def key(self) -> str:
        """Digest of everything that decides the unit's rows."""
        files = [(*asdict(piece).values(), Path(piece.path).stat().st_mtime_ns) for piece in self.pieces]
        plan = (self.plan.sequence, self.plan.held_out, self.plan.field, self.plan.shard_bytes)
        return xxhash.xxh128_hexdigest(json.dumps([files, plan, self.tokeniser.digest]))


def prepare(plan: Preparation) -> Card:
    """Makes the dataset that `plan` describes and gives its card; raises UserError and leaves nothing half-written."""
    out, staging = Path(plan.out), Path(plan.out.rstrip("/") + ".partial")
    require(0 <= plan.held_out < 1, f"held-out share {plan.held_out} must lie in [0, 1)")
    require(plan.workers >= 0, f"--workers {plan.workers} must not be negative; 0: one a core")
    require(plan.sequence >= 2, f"--sequence {plan.sequence} must be at least 2")
    files = expand(plan.sources)
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    print_of_files = xxhash.xxh128_hexdigest(json.dumps(stamps))
    asked = {**asdict(plan), "out": "", "workers": 0, "sources": list(plan.sources), "files": print_of_files}
    if out.exists():
        require((out / NAME).is_file(), f"{out} exists and is no dataset; choose another --out")
        same = (out / "plan.json").is_file() and json.loads((out / "plan.json").read_text()) == asked
        require(same, f"{out} holds a dataset made otherwise or of other files; choose another --out, or remove it")
        return load_card(plan.out)
    work = units(files)
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {staging}: {error.strerror}") from None
    tokeniser = settle(plan, work, staging, print_of_files)
    done = run([Unit(i, pieces, staging, plan, tokeniser) for i, pieces in enumerate(work)], plan.workers)
    card = finish(staging, plan, tokeniser, done)
    (staging / "plan.json").write_text(json.dumps(asked))
    staging.rename(out)
    return card


def settle(plan: Preparation, work: Sequence[Sequence[Piece]], staging: Path, files: str) -> Tokeniser:
    """The tokeniser: the one a killed preparation had made, or a new one."""
    path, note = staging / TOKENISER, staging / "tokeniser.txt"
    if path.is_file() and note.is_file() and note.read_text() == f"{plan.tokeniser} {files}":
        made = make(str(path), ())
        return Tokeniser(plan.tokeniser, made.vocabulary, made.document, made.digest, made.tokenizer)
    # every k-th unit's documents, so that the sample is not the head of the alphabet
    stride = max(1, len(work) // 16)
    sample = (text for pieces in work[::stride] for piece in pieces for text in documents(piece, plan.field))
    tokeniser = make(plan.tokeniser, sample)
    tokeniser.save(path)
    note.write_text(f"{plan.tokeniser} {files}")
    return tokeniser


def run(work: Sequence[Unit], workers: int) -> list[dict[str, Any]]:
    """Writes all units, several at a time, and gives their notes in order."""
    bar = progress(
        total=sum(piece.size for unit in work for piece in unit.pieces), unit="B", unit_scale=True, desc="prepare"
    )
    notes: dict[int, dict[str, Any]] = {}
    count = min(workers or os.cpu_count() or 1, len(work))
    with bar, multiprocessing.get_context("fork").Pool(count) as pool:
        for index, note in pool.imap_unordered(write_unit, work):
            if "error" in note:
                raise UserError(note["error"])
            notes[index] = note
            bar.update(sum(piece.size for piece in work[index].pieces))
    return [notes[index] for index in range(len(work))]


def write_unit(unit: Unit) -> tuple[int, dict[str, Any]]:
    """Writes one unit unless it stands already; gives its index and note, or the user's error in words."""
    mark = unit.folder / f"{unit.name}.json"
    if mark.is_file():
        note = json.loads(mark.read_text())
        if note["key"] == unit.key:
            return unit.index, note
    try:
        note = {"key": unit.key, **pack(unit)}
    except UserError as error:
        return unit.index, {"error": str(error)}
    mark.with_suffix(".tmp").write_text(json.dumps(note))
    mark.with_suffix(".tmp").rename(mark)
    return unit.index, note


def pack(unit: Unit) -> dict[str, Any]:
    """Tokenises and packs a unit's documents; counts rows, documents and what filled no row."""
    sequence, kind = unit.plan.sequence, row_type(unit.tokeniser.vocabulary)
    writers: dict[str, Any] = {}
    rest: dict[str, np.ndarray] = {split: np.empty(0, kind) for split in SPLITS}
    rows, counted = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        shutil.rmtree(unit.folder / split / unit.name, ignore_errors=True)
    for split, ids in tokenised(unit):
        counted[split] += 1
        buffer = np.concatenate([rest[split], np.asarray(ids, kind)])
        full = (len(buffer) - 1) // sequence
        for row in range(full):
            if split not in writers:
                folder = unit.folder / split / unit.name
                writers[split] = writer(folder, unit.tokeniser.vocabulary, sequence, unit.plan.shard_bytes)
            writers[split].write({COLUMN: buffer[row * sequence : (row + 1) * sequence + 1]})
        rows[split] += full
        rest[split] = buffer[full * sequence :]
    for opened in writers.values():
        opened.finish()
    return {"rows": rows, "documents": counted, "dropped": int(sum(len(tail) for tail in rest.values()))}


def tokenised(unit: Unit) -> Iterator[tuple[str, list[int]]]:
    """(split, ids) of each document; a document's split depends on its text alone."""
    texts: list[str] = []

    def batch() -> Iterator[tuple[str, list[int]]]:
        for text, ids in zip(texts, unit.tokeniser.encode(texts), strict=True):
            chosen = xxhash.xxh64_intdigest(text) % 2**20 < unit.plan.held_out * 2**20
            yield SPLITS[chosen], ids
        texts.clear()

    for piece in unit.pieces:
        for text in documents(piece, unit.plan.field):
            if text:
                texts.append(text)
            if len(texts) == TEXTS:
                yield from batch()
    yield from batch()


def finish(staging: Path, plan: Preparation, tokeniser: Tokeniser, notes: Sequence[dict[str, Any]]) -> Card:
    """Merges the units' indexes and writes the card."""
    total = {what: {split: sum(n[what][split] for n in notes) for split in SPLITS} for what in ("rows", "documents")}
    require(
        total["rows"]["train"] > 0,
        f"the sources fill no training row of {plan.sequence} tokens; use a smaller --sequence",
    )
    prints = [tokeniser.digest, str(plan.sequence)]
    for split in SPLITS:
        (staging / split).mkdir(exist_ok=True)
        parts = [f"unit-{i:05d}" for i, note in enumerate(notes) if note["rows"][split]]
        for shard in merge(staging / split, parts):
            prints += [split, shard["raw_data"]["basename"], shard["raw_data"]["hashes"][DIGEST]]
    card = Card(
        tokeniser=plan.tokeniser,
        tokeniser_digest=tokeniser.digest,
        vocabulary=tokeniser.vocabulary,
        document=tokeniser.document,
        sequence=plan.sequence,
        rows=total["rows"],
        documents=total["documents"],
        tokens={split: count * plan.sequence for split, count in total["rows"].items()},
        dropped=sum(note["dropped"] for note in notes),
        fingerprint=xxhash.xxh128_hexdigest("\n".join(prints)),
    )
    save_card(staging, card)
    return card
