"""Where rows come from, and in which order."""

from dataclasses import dataclass, field
from typing import Literal

from nlscale.config.errors import positive, require


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One dataset of a mixture."""

    path: str = ""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Data:
    """A prepared dataset (or several with weights) and the order of its rows.

    `canonical_nodes`, `shuffle_block` and `shuffle_seed` alone decide the order of the global batches; no layout does.
    """

    path: str | None = None
    streams: list[Stream] = field(default_factory=list)  # a mixture, instead of path
    sequence: int = 2048
    vocabulary: int | None = None  # of the tokeniser, for checks and plans before a dataset is prepared
    shuffle: bool = True
    shuffle_seed: int = 9176
    shuffle_block: int = 4096  # rows
    canonical_nodes: int = 1
    replay: str | None = None  # a dataset of earlier rows, for levels whose `replay` says what they count there
    replay_batch: int = 0  # rows of it a step, over all replicas
    damaged: Literal["stop", "quarantine"] = (
        "stop"  # a shard that does not match its digest; quarantine: its rows are void
    )
    workers: int = 0  # loader processes a rank; 0: rows are read between steps

    def __post_init__(self) -> None:
        require(bool(self.path) != bool(self.streams), "data: give either data.path or data.streams")
        require(self.sequence >= 2, f"data.sequence={self.sequence} must be at least 2")
        counts = ("canonical_nodes", "shuffle_block", "vocabulary")
        positive("data", **{name: getattr(self, name) for name in counts})
        for name in ("workers", "shuffle_seed", "replay_batch"):
            require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)} must not be negative")
        require(
            bool(self.replay) == (self.replay_batch > 0),
            f"data: replay needs both data.replay={self.replay} and data.replay_batch={self.replay_batch}",
        )
        for stream in self.streams:
            require(bool(stream.path) and stream.weight > 0, "data.streams: each needs a path and a weight above 0")

    @property
    def sources(self) -> list[Stream]:
        """The mixture, also where it is a single dataset."""
        return self.streams or [Stream(path=self.path or "", weight=1.0)]
