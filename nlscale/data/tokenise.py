"""Text -> token ids: a BPE trained on the corpus, a given `tokenizers` file, or bytes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nlscale.config.errors import UserError, require
from nlscale.data.card import TOKENISER, load_card

DOCUMENT = "<|doc|>"
STARTS = (DOCUMENT, "<|endoftext|>", "<|begin_of_text|>", "<s>", "</s>")  # what a given tokeniser may call it
LARGEST = 2**20  # tokens of a vocabulary that is trained
SAMPLE = 2**23  # characters that a tokeniser is trained on


@dataclass(frozen=True)
class Tokeniser:
    """Encodes documents. `document` is the id that starts each; `bytes` has no `tokenizer`."""

    name: str
    vocabulary: int
    document: int
    digest: str
    tokenizer: Tokenizer | None

    def encode(self, texts: list[str]) -> Iterator[list[int]]:
        """Token ids of each text, its document token first."""
        if self.tokenizer is None:
            for text in texts:
                yield [self.document, *(byte + 1 for byte in text.encode("utf-8"))]
        else:
            for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                yield [self.document, *encoding.ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; document tokens are left out."""
        kept = [i for i in ids if i != self.document]
        if self.tokenizer is None:
            return bytes(i - 1 for i in kept).decode("utf-8", errors="replace")
        return str(self.tokenizer.decode(kept))

    def save(self, path: Path) -> None:
        """Writes tokenizer.json; bytes needs none."""
        if self.tokenizer is not None:
            self.tokenizer.save(str(path))


def make(name: str, sample: Iterable[str]) -> Tokeniser:
    """`bytes`, `bpe:VOCABULARY` (trained on `sample`) or the path of a tokenizers JSON file; raises UserError."""
    if name == "bytes":
        return Tokeniser(name, 257, 0, "bytes", None)
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        require(
            size.isdigit() and int(size) > 257, f"tokeniser '{name}': bpe:N needs N above 257, for example bpe:32768"
        )
        require(int(size) <= LARGEST, f"tokeniser '{name}': bpe:N takes N of at most {LARGEST:,}")
        return wrapped(name, train(sample, int(size)))
    require(Path(name).is_file(), f"tokeniser '{name}' is neither bytes, nor bpe:N, nor a file")
    try:
        return wrapped(name, Tokenizer.from_file(name))
    except Exception as error:  # the library raises bare Exception for a file that it cannot read
        raise UserError(f"tokeniser '{name}' is no tokenizers JSON file: {error}") from None


def of_dataset(folder: str) -> Tokeniser:
    """The tokeniser that a dataset was made with; raises UserError where it is not there, or is another."""
    card = load_card(folder)
    return kept(Path(folder), card.tokeniser, card.tokeniser_digest)


def kept(folder: Path, name: str, digest: str) -> Tokeniser:
    """The tokeniser in a folder of rows, or of weights that learned of them; raises UserError where it is not there, or is
    another than its name and digest say.
    """
    path = folder / TOKENISER
    require(name == "bytes" or path.is_file(), f"{folder} holds no {TOKENISER}; a run that goes on saves its own again")
    made = make(name if name == "bytes" else str(path), ())
    require(made.digest == digest, f"{path} is not the tokeniser that {folder} was made with")
    return made


def train(sample: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE; the document token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[DOCUMENT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(limited(sample, SAMPLE), trainer)
    return tokenizer


def of_bytes() -> Tokenizer:
    """The tokeniser `bytes` in the library's form: byte-level BPE that merges nothing."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = {byte: 256 + i for i, byte in enumerate(b for b in range(256) if b not in shown)}  # the library's spelling
    vocabulary = {DOCUMENT: 0} | {chr(hidden.get(byte, byte)): byte + 1 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([DOCUMENT])
    return tokenizer


def limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts until `characters` have been given."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def wrapped(name: str, tokenizer: Tokenizer) -> Tokeniser:
    """A Tokeniser around a library object; finds its document token."""
    tokenizer.encode_special_tokens = True  # text that spells a special token stays text
    document = next((i for i in map(tokenizer.token_to_id, STARTS) if i is not None), None)
    if document is None:
        raise UserError(f"tokeniser '{name}' has none of {', '.join(STARTS)} to start a document with")
    digest = xxhash.xxh128_hexdigest(tokenizer.to_str())
    return Tokeniser(name, tokenizer.get_vocab_size(), document, digest, tokenizer)
