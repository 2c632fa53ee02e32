"""Preparation: formats, splits, packing, restart, and one clear line for what is wrong."""

import gzip
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from nlscale.config.errors import UserError
from nlscale.data import write
from nlscale.data.mds import StreamingDataset, tokens
from nlscale.data.sources import documents, units
from nlscale.data.tokenise import make
from nlscale.data.write import Preparation, prepare

TEXT = "a level that does not move needs no reduction, no optimizer work, no gather\n" * 30


def rows(folder: Path, split: str = "train") -> list[np.ndarray]:
    dataset = StreamingDataset(local=str(folder), split=split, batch_size=1, num_canonical_nodes=1)
    return [tokens(dataset[i]) for i in range(dataset.num_samples)]


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    texts = [TEXT.replace("level", f"level{i}") for i in range(6)]
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "txt" / f"{i}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    frames = [zstandard.compress(lines[i : i + 1000]) for i in range(0, len(lines), 1000)]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    seen = []
    for source in ("txt", "txt/*.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "b.jsonl.zst"):
        out = tmp_path / f"out-{len(seen)}"
        card = prepare(
            Preparation(sources=(str(tmp_path / source),), out=str(out), sequence=50, tokeniser="bytes", held_out=0)
        )
        assert card.documents == {"train": 6, "heldout": 0}
        seen.append(np.stack(rows(out)))
    assert all(np.array_equal(seen[0], other) for other in seen[1:])
    flat = np.concatenate([seen[0][0], *seen[0][1:, 1:]])
    expected = np.concatenate([[0, *(b + 1 for b in text.encode())] for text in texts])
    assert np.array_equal(flat, expected[: len(flat)]) and len(expected) - len(flat) < 50


def test_pieces_of_a_long_file_give_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " + "x" * (i % 97)}) + "\n" for i in range(500)))
    monkeypatch.setattr("nlscale.data.sources.SMALLEST_UNIT", 1000)
    pieces = [piece for unit in units([path]) for piece in unit]
    assert len(pieces) > 10
    texts = [text for piece in pieces for text in documents(piece, "text")]
    assert [int(text.split()[1]) for text in texts] == list(range(500))


def test_splits_are_by_document_and_disjoint(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i} " * 30}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    card = prepare(
        Preparation(
            sources=(str(tmp_path / "a.jsonl"),), out=str(tmp_path / "o"), sequence=16, tokeniser="bytes", held_out=0.2
        )
    )
    assert card.documents["heldout"] == pytest.approx(80, abs=30)
    starts = {split: {bytes(r) for r in rows(tmp_path / "o", split)} for split in ("train", "heldout")}
    assert not starts["train"] & starts["heldout"]


def test_a_killed_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlscale.data.sources.SMALLEST_UNIT", 4000)
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(TEXT.replace("level", f"level{i}"))
    plan = Preparation(
        sources=(str(tmp_path / "*.txt"),), out=str(tmp_path / "o"), sequence=32, tokeniser="bpe:300", workers=1
    )
    reference = prepare(Preparation(**{**plan.__dict__, "out": str(tmp_path / "reference")}))
    child = os.fork()
    if child == 0:
        os.setsid()
        slow = write.pack
        write.pack = lambda unit: (time.sleep(0.05), slow(unit))[1]  # type: ignore[assignment]
        prepare(plan)
        os._exit(0)
    staging = tmp_path / "o.partial"
    while len(list(staging.glob("unit-*.json"))) < 3:
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = {mark: mark.stat().st_mtime_ns for mark in staging.glob("unit-*.json")}
    assert 3 <= len(done) < 10 and not (tmp_path / "o").exists()
    assert prepare(plan).fingerprint == reference.fingerprint
    kept = [mark for mark, when in done.items() if (tmp_path / "o" / mark.name).stat().st_mtime_ns == when]
    assert len(kept) == len(done)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, {}, "names no file"),
        (b"", {}, "empty"),
        (b"caf\xe9 " * 400, {}, "not UTF-8: byte 0xe9 at 3"),
        (b'{"body": "x"}\n', {"suffix": ".jsonl"}, "no text field 'text'.*the line has body"),
        (b"{broken\n", {"suffix": ".jsonl"}, "not a JSON line"),
        (
            b'{"text": "\\ud800 half"}\n',
            {"suffix": ".jsonl"},
            "at byte 0: character 0 of 'text' is half of a surrogate",
        ),
        (b"no gzip at all", {"suffix": ".txt.gz"}, "cannot be read"),
        (zstandard.compress(b"whole " * 400)[:-6], {"suffix": ".txt.zst"}, "the file ends inside a compressed frame"),
        (zstandard.compress(b"whole " * 400) + b"not a frame", {"suffix": ".txt.zst"}, "cannot be read"),
        (b"short", {}, "fill no training row"),
        (b"x" * 4000, {"tokeniser": "bpe:12"}, "needs N above 257"),
        (b"x" * 4000, {"tokeniser": "bpe:99999999999"}, "at most 1,048,576"),
        (b"x" * 4000, {"tokeniser": "wordpiece"}, "neither bytes, nor bpe:N, nor a file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, content: bytes | None, options: dict, words: str) -> None:
    path = tmp_path / f"in{options.get('suffix', '.txt')}"
    if content is not None:
        path.write_bytes(content)
    plan = Preparation(
        sources=(str(path),), out=str(tmp_path / "o"), sequence=64, tokeniser=options.get("tokeniser", "bytes")
    )
    with pytest.raises(UserError, match=words) as caught:
        prepare(plan)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_an_existing_dataset_is_kept_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    plan = Preparation(
        sources=(str(tmp_path / "a.txt"),), out=str(tmp_path / "o"), sequence=32, tokeniser="bytes", held_out=0
    )
    assert prepare(plan) == prepare(plan)
    with pytest.raises(UserError, match="made otherwise"):
        prepare(Preparation(**{**plan.__dict__, "sequence": 64}))
    (tmp_path / "a.txt").write_text(TEXT + "more")
    with pytest.raises(UserError, match="of other files"):
        prepare(plan)


def test_tokenisers_give_the_text_back(tmp_path: Path) -> None:
    text = "def due(level, step): return step % 4 == 0  # é <|doc|> is text here"
    trained = make("bpe:300", [text] * 3)
    trained.save(tmp_path / "tokenizer.json")
    for tokeniser in (make("bytes", ()), trained, make(str(tmp_path / "tokenizer.json"), ())):
        (ids,) = tokeniser.encode([text])
        assert ids[0] == tokeniser.document and max(ids) < tokeniser.vocabulary
        assert ids.count(tokeniser.document) == 1
        assert tokeniser.decode(ids) == text
