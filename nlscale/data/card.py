"""dataset.json: what a prepared dataset is, readable without torch."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nlscale.config.data import Data
from nlscale.config.errors import UserError, require

NAME = "dataset.json"
TOKENISER = "tokenizer.json"  # beside it, where the tokeniser is not `bytes`
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Card:
    """A dataset's identity. `fingerprint` covers the tokeniser, the sequence and the digest of every shard."""

    tokeniser: str  # what was asked for: bytes, bpe:N or a file's name
    tokeniser_digest: str
    vocabulary: int
    document: int  # token that starts every document
    sequence: int  # T; a row holds T + 1 tokens
    rows: dict[str, int]  # by split
    documents: dict[str, int]
    tokens: dict[str, int]  # in whole rows
    dropped: int  # tokens in ends of units that filled no row
    fingerprint: str


def load_card(folder: str, name: str = "data.path") -> Card:
    """The card of a prepared dataset; raises UserError where there is none."""
    path = Path(folder, NAME)
    require(
        Path(folder).is_dir(),
        f"{name}={folder}: no such folder; `nlscale data prepare SOURCE --out {folder}` makes it",
    )
    require(path.is_file(), f"{folder} holds no {NAME}: it was not made (to the end) by `nlscale data prepare`")
    try:
        return Card(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def tokeniser_file(folder: str) -> dict[str, str]:
    """Name and text of the file that holds a dataset's tokeniser; `bytes` has none."""
    path = Path(folder, TOKENISER)
    return {TOKENISER: path.read_text()} if path.is_file() else {}


def save_card(folder: Path, card: Card) -> None:
    """Writes dataset.json; its presence says that the dataset is complete."""
    (folder / NAME).write_text(json.dumps(asdict(card), indent=1) + "\n")


def check_replay(data: Data) -> tuple[Data, Card]:
    """Where the rows that levels replay come from, and its card; raises UserError where they do not fit the run's own."""
    earlier = replace(data, path=data.replay, streams=[], replay=None, replay_batch=0)
    (mine, *_), (card,) = check_data(data, False), check_data(earlier, False, "data.replay")
    require(
        mine.tokeniser_digest == card.tokeniser_digest,
        f"data.replay={data.replay} was made with tokeniser {card.tokeniser}, the run's data with {mine.tokeniser}; "
        "they must share one",
    )
    return earlier, card


def check_data(data: Data, held_out: bool, name: str = "data.path") -> list[Card]:
    """The cards of all streams; raises UserError where they do not fit the run or each other.

    `held_out` says that the run evaluates, so that each stream needs held-out rows; `name` is the setting they come from.
    """
    cards = [load_card(source.path, name) for source in data.sources]
    for source, card in zip(data.sources, cards, strict=True):
        require(
            card.sequence == data.sequence,
            f"{source.path} holds rows of {card.sequence} tokens, but data.sequence={data.sequence}; "
            f"data.sequence={card.sequence} would work",
        )
        require(
            card.rows["heldout"] > 0 or not held_out,
            f"{source.path} has no held-out rows; train.evaluate_rows=0 would work, or prepare it with a larger --held-out",
        )
        require(
            card.tokeniser_digest == cards[0].tokeniser_digest,
            f"{source.path} was made with tokeniser {card.tokeniser} ({card.tokeniser_digest[:8]}), "
            f"{data.sources[0].path} with {cards[0].tokeniser} ({cards[0].tokeniser_digest[:8]}): "
            "streams of one mixture share a tokeniser",
        )
    return cards
