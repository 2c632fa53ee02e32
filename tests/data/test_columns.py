"""Folders of Hugging Face's `datasets`, as `save_to_disk` writes them and as hubs keep them, read as JSON lines are."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlscale.config.errors import UserError
from nlscale.data import columns
from nlscale.data.sources import documents, expand, units
from nlscale.data.write import Preparation, prepare

TEXTS = [f"document {i} says that " + "a level moves at its own pace " * (i % 7) for i in range(300)]
TABLE = pa.table({"text": TEXTS, "id": list(range(300))})


def arrow(path: Path, table: Any = TABLE, made: Any = pa.ipc.new_stream) -> Path:
    """Blocks of 50 rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, made(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return path


def parquet(path: Path, table: Any = TABLE) -> Path:
    """The same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=50)
    return path


def saved(folder: Path) -> Path:
    """As `Dataset.save_to_disk` leaves it, with a cache of its `map` beside the rows."""
    half = len(TEXTS) // 2
    arrow(folder / "data-00000-of-00002.arrow", TABLE.slice(0, half))
    arrow(folder / "data-00001-of-00002.arrow", TABLE.slice(half))
    arrow(folder / "cache-f809da5ca8384cc7.arrow", TABLE.slice(0, 3))
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")
    return folder


def read(*sources: str) -> list[str]:
    pieces = [piece for unit in units(expand(sources)) for piece in unit]
    return [text for piece in pieces for text in documents(piece, "text")]


def test_every_form_gives_the_rows_of_json_lines(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text("a card")
    words = TABLE.set_column(0, "text", TABLE["text"].dictionary_encode())
    sources = {
        "saved": saved(tmp_path / "saved"),
        "hub": parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet").parents[1],
        "indexed": arrow(tmp_path / "indexed.arrow", made=pa.ipc.new_file),
        "words": arrow(tmp_path / "words.arrow", words),
        "large": parquet(
            tmp_path / "large.parquet", TABLE.cast(pa.schema({"text": pa.large_string(), "id": pa.int32()}))
        ),
    }
    cards = {}
    for name, source in {"lines": lines, **sources}.items():
        plan = Preparation(sources=(str(source),), out=str(tmp_path / f"out-{name}"), sequence=40, tokeniser="bytes")
        cards[name] = prepare(plan)
        assert read(str(source)) == TEXTS, name
    assert len({(each.fingerprint, each.rows["train"]) for each in cards.values()}) == 1 and len(cards) == 6


@pytest.mark.parametrize("made", [arrow, parquet])
def test_blocks_of_a_large_file_are_read_once_each(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / f"a.{made.__name__}")
    monkeypatch.setattr("nlscale.data.sources.SMALLEST_UNIT", path.stat().st_size // 4)
    pieces = [piece for unit in units([path]) for piece in unit]
    assert len(pieces) >= 4 and [pieces[0].start, pieces[-1].stop] == [0, columns.blocks(str(path))]
    assert read(str(path)) == TEXTS


def test_several_splits_are_not_mixed(tmp_path: Path) -> None:
    both = tmp_path / "both"
    for split in ("train", "test"):
        saved(both / split)
        parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for source, one in ((both, f"{both}/train"), (tmp_path / "hub", f"{tmp_path}/hub/data/train-*.parquet")):
        with pytest.raises(UserError, match="holds the splits test, train; name one of them: ") as refusal:
            expand([str(source)])
        assert one in str(refusal.value) and read(one) == TEXTS


def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = pa.table({"text": ["a", None]})
    torn = parquet(tmp_path / "torn.parquet")
    torn.write_bytes(torn.read_bytes()[:-9])
    cut = arrow(tmp_path / "cut.arrow")
    cut.write_bytes(cut.read_bytes()[:3000])
    for path, field, words in (
        (parquet(tmp_path / "a.parquet"), "body", "no text field 'body'; name it with --field (there are text, id)"),
        (arrow(tmp_path / "a.arrow"), "id", "field 'id' is int64, no text"),
        (arrow(tmp_path / "null.arrow", nothing), "text", "null.arrow at block 0, row 1: 'text' is null"),
        (torn, "text", "torn.parquet cannot be read: "),
        (cut, "text", "cut.arrow cannot be read: "),
    ):
        with pytest.raises(UserError) as refusal:
            list(columns.texts(str(path), 0, None, field))
        assert words in str(refusal.value)
    monkeypatch.setattr(columns.importlib, "import_module", absent)
    with pytest.raises(UserError, match="are read by pyarrow: "):
        columns.blocks(str(tmp_path / "a.parquet"))


def absent(name: str) -> Any:
    raise ImportError(name)
