"""`nlscale data`: prepare and verify."""

import argparse
import importlib
from typing import Any

from nlscale.config.errors import UserError
from nlscale.runtime.quiet import quiet
from nlscale.verbs.common import add


def verbs(parent: Any) -> None:
    """Adds them."""
    data = parent.add_parser("data", help="prepare and verify datasets").add_subparsers(required=True, metavar="VERB")
    made = add(data, "prepare", prepare, "documents -> tokens -> packed MDS shards")
    made.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="files, folders or globs of text, JSON lines, Parquet or Arrow; or stdlib",
    )
    made.add_argument("--out", required=True, help="folder of the dataset")
    made.add_argument("--sequence", type=int, default=2048, help="tokens a row")
    made.add_argument("--tokeniser", default="bpe:32768", help="bytes, bpe:N (trained here) or a tokenizers JSON file")
    made.add_argument("--held-out", type=float, default=0.02, help="share of the documents held out")
    made.add_argument("--field", default="text", help="field of a JSON line, or column, that holds the text")
    made.add_argument("--workers", type=int, default=0, help="processes; 0: one a core")
    add(data, "verify", verify, "audit every shard of a dataset").add_argument("folder")


def prepare(options: argparse.Namespace) -> None:
    """`nlscale data prepare`."""
    quiet()
    write = importlib.import_module("nlscale.data.write")
    plan = write.Preparation(
        sources=tuple(options.sources),
        out=options.out,
        sequence=options.sequence,
        tokeniser=options.tokeniser,
        held_out=options.held_out,
        field=options.field,
        workers=options.workers,
    )
    card = write.prepare(plan)
    print(
        f"dataset      {options.out}  ({card.tokeniser}, {card.vocabulary} tokens, fingerprint {card.fingerprint[:12]})"
    )
    for split, rows in card.rows.items():
        documents, tokens = card.documents[split], card.tokens[split]
        print(f"{split:12s} {documents:,} documents, {rows:,} rows of {card.sequence}, {tokens:,} tokens")


def verify(options: argparse.Namespace) -> None:
    """`nlscale data verify`."""
    quiet()
    faults = importlib.import_module("nlscale.data.verify").verify(options.folder)
    if faults:
        more = "".join(f"\n{fault}" for fault in faults[1:])
        raise UserError(f"{options.folder} is damaged: {faults[0]}{more}")
    print(f"{options.folder}: every shard matches its digest")
