"""Which token comes next: a draw from what a network predicts.

B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nlscale.config.errors import require
from nlscale.config.train import SEEDS


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; raises UserError for what is out of range."""

    temperature: float = 0.8  # 0: the likeliest token
    top_k: int = 0  # of so many likeliest tokens; 0: of all
    top_p: float = 1.0  # of the likeliest tokens that have this probability together; 1: of all
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.temperature < float("inf"), f"--temperature {self.temperature} must not be negative")
        require(self.top_k >= 0, f"--top-k {self.top_k} must not be negative; 0 leaves all tokens in")
        require(0 <= self.seed < SEEDS, f"--seed {self.seed} must not be negative, and below {SEEDS}")
        require(0 < self.top_p <= 1, f"--top-p {self.top_p} must lie above 0 and not above 1")

    def likely(self, logits_BV: Tensor) -> Tensor:
        """Probabilities (B, V) in float64 that tokens are drawn with."""
        scores = logits_BV.double()
        if self.temperature == 0:
            return torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        scores = scores / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        shares, order = scores.softmax(1).sort(dim=1, descending=True, stable=True)
        before = shares.cumsum(1) - shares  # of likelier tokens: the first is always in
        kept = shares.masked_fill((before >= self.top_p) & (before > 0), 0)
        return torch.zeros_like(shares).scatter_(1, order, kept / kept.sum(1, keepdim=True))

    def generator(self) -> torch.Generator:
        """What draws; on every machine and rank the same."""
        return torch.Generator().manual_seed(self.seed)

    def draw(self, logits_BV: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens (B,), on the CPU."""
        return torch.multinomial(self.likely(logits_BV.cpu()), 1, generator=generator)[:, 0]
