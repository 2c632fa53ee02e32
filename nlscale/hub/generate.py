"""`nlscale generate`: a text that goes on, token by token, with the memories of everything read so far."""

import sys
import time
from collections.abc import Iterator, Sequence

import torch

from nlscale.config.errors import require
from nlscale.data.tokenise import Tokeniser
from nlscale.hub.opened import Source, opened
from nlscale.hub.sampling import Sampling
from nlscale.model.reader import Reader, reader

MOST = 2**20  # tokens that are made


def continued(
    reading: Reader, ids: Sequence[int], count: int, tokeniser: Tokeniser, sampling: Sampling, piece: int
) -> Iterator[int]:
    """At most `count` tokens that follow `ids`, until the document ends; `piece`: tokens that are read at once."""
    generator, device = sampling.generator(), reading.starts.device
    unread = list(ids)
    for _ in range(count):
        for first in range(0, len(unread), piece):
            tokens = torch.tensor([unread[first : first + piece]], device=device)
            x = reading.read(tokens, tokens == tokeniser.document)
        logits = reading.predicted(x[-1:])[0, :, : tokeniser.vocabulary]  # the model's is rounded up
        token = int(sampling.draw(logits, generator))
        if token == tokeniser.document:
            return
        yield token
        unread = [token]


class Said:
    """Tokens as the text that they add, once whole characters of it are there."""

    def __init__(self, tokeniser: Tokeniser) -> None:
        self.tokeniser, self.ids, self.first, self.told = tokeniser, list[int](), 0, 0

    def add(self, token: int) -> str:
        """What is new, without a character that may not be whole yet."""
        self.ids.append(token)
        text = self.rest()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.first, self.told = self.told, len(self.ids)
        return text

    def rest(self) -> str:
        """What has not been told: the text of the last tokens less that of those told among them, as the text of a token
        may depend on the one before.
        """
        before = self.tokeniser.decode(self.ids[self.first : self.told])
        return self.tokeniser.decode(self.ids[self.first :])[len(before) :]


def generate(source: Source, prompt: str, count: int, sampling: Sampling) -> None:
    """Prints the prompt and what follows it, on rank 0; what it took goes to stderr. A collective.

    Raises UserError for a checkpoint that cannot be read with.
    """
    require(1 <= count <= MOST, f"--tokens {count} must lie between 1 and {MOST}")
    (ids,) = source.tokeniser.encode([prompt])
    run = source.long(len(ids) + count)
    with opened(run, source.path) as (model, world):
        speaks, said, made = world.leads, Said(source.tokeniser), 0
        reading, began = reader(model), time.monotonic()
        tell(prompt, speaks)
        first = began
        piece = source.run.data.sequence
        for token in continued(reading, ids, count, source.tokeniser, sampling, piece):
            first = first if made else time.monotonic()
            made += 1
            tell(said.add(token), speaks)
        tell(said.rest() + "\n", speaks)
        ended = time.monotonic()
        if speaks:
            rate = (made - 1) / max(ended - first, 1e-9)
            read = f"step {source.step}: {len(ids):,} tokens read in {first - began:.2f} s"
            end = "" if made == count else ", then the document ended"
            print(f"{read}; {made:,} made, {rate:,.1f} a second{end}", file=sys.stderr)


def tell(text: str, speaks: bool) -> None:
    """Prints what there is to print, at once."""
    if speaks:
        print(text, end="", flush=True)
