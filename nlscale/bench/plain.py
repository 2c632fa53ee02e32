"""The yardstick: a plain torch Transformer of the same shape, as short as it gets, with torch's own AdamW."""

import torch
import torch.nn.functional as F
from nlscale_kernels.rotary import rotary_table, rotate
from torch import Tensor, nn

from nlscale.config.model import Model


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.heads, self.groups = model.heads, model.key_value_heads
        self.norm1, self.norm2 = nn.RMSNorm(model.width), nn.RMSNorm(model.width)
        self.qkv = nn.Linear(model.width, (self.heads + 2 * self.groups) * model.head_width, bias=False)
        self.out = nn.Linear(model.width, model.width, bias=False)
        self.up = nn.Linear(model.width, 2 * model.feed_forward, bias=False)
        self.down = nn.Linear(model.feed_forward, model.width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (self.heads + 2 * self.groups, -1)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=1)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups != self.heads)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, model: Model, tokens: int) -> None:
        super().__init__()
        assert model.vocabulary is not None
        self.embed = nn.Embedding(model.vocabulary, model.width)
        self.layers = nn.ModuleList([Layer(model) for _ in range(model.layers)])
        self.norm, self.head = nn.RMSNorm(model.width), nn.Linear(model.width, model.vocabulary, bias=False)
        self.rotary = tuple(part[:, 0, 0] for part in rotary_table(tokens, model.head_width, model.rope_base))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.rotary)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class PlainTrainer:
    """One step: forward, backward, clip, AdamW."""

    def __init__(self, model: Model, tokens: int, lr: float) -> None:
        self.model = Plain(model, tokens)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """One update; gives the loss."""
        loss = self.model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
