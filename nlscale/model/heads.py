"""What every mixer with a memory a head shares: one fused projection in, a short convolution, one projection out.

T tokens, B rows, D width, H heads of this rank, K head width, f features of a head.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from nlscale_kernels.convolution import convolve
from nlscale_kernels.unit import unit
from torch import Tensor, nn

from nlscale.config.model import Model
from nlscale.model.exchange import Exchange
from nlscale.model.layers import Norm
from nlscale.model.scene import Scene
from nlscale.runtime.leaf import Leaf

Heads = dict[str, Tensor]  # (B, H, T, f) by name
NOTHING = -2000.0  # whose exponential is 0, and differences of its sums are numbers


class HeadMixer(MegatronModule):
    """Norm, projections by heads and the way back; a rule between them says what the heads do.

    Tensor parallelism splits heads, context parallelism too (model/exchange.py), so no rule needs a collective.
    """

    attends = False  # asks for the scene's mask

    def __init__(
        self,
        model: Model,
        config: TransformerConfig,
        exchange: Exchange,
        parts: dict[str, int],
        taps: int = 1,
        convolved: Sequence[str] = (),
        local: Sequence[str] = (),
    ) -> None:
        """`parts`: projection -> features a head; the first ones may be `convolved`, the last ones (`local`) stay with
        this rank's tokens.
        """
        super().__init__(config)
        self.exchange, self.width = exchange, model.head_width
        self.held = model.heads // config.tensor_model_parallel_size  # heads of this tensor-parallel rank
        self.heads = self.held // exchange.ranks
        self.parts, self.convolved, self.local = parts, list(convolved), list(local)
        self.norm = Norm(model.width, config)
        options = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
        total = model.heads * sum(parts.values())
        self.inward = build_module(ColumnParallelLinear, model.width, total, gather_output=False, **options)
        inner = model.heads * model.head_width
        self.out = build_module(
            RowParallelLinear, inner, model.width, input_is_parallel=True, is_expert=False, **options
        )
        self.taps = self.made(sum(parts[name] for name in self.convolved) * self.held, taps) if convolved else None
        self.biases = nn.ParameterDict({name: self.made(self.held) for name, f in parts.items() if f == 1})

    def made(self, *shape: int) -> nn.Parameter:
        """A parameter that model/init.py fills."""
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        return nn.Parameter(torch.empty(*shape, dtype=self.config.params_dtype, device=device))

    def project(self, x_TBD: Tensor, scene: Scene, tail: Heads | None) -> tuple[Heads, Heads | None]:
        """All projections, and what the convolution must be told of the last tokens when the row goes on: (B, H, t, f)."""
        fused, _ = self.inward(self.norm(x_TBD))
        names = list(self.parts)
        pieces = dict(zip(names, fused.split([f * self.held for f in self.parts.values()], -1), strict=True))
        moving = [name for name in names if name not in self.local]
        pieces |= zip(moving, self.exchange.to_heads([pieces[name] for name in moving]), strict=True)
        tail_next = None
        if self.taps is not None:
            joined = pieces[self.convolved[0]]
            joined = torch.cat([pieces[name] for name in self.convolved], -1) if self.convolved[1:] else joined
            before = None if tail is None else torch.cat([by_token(tail[name]) for name in self.convolved], -1)
            joined, last = self.convolve(joined, scene, before)
            pieces |= self.apart(joined)
            if last is not None:
                tail_next = {name: self.by_head(each, self.parts[name]) for name, each in self.apart(last).items()}
        heads = {name: self.by_head(piece, self.parts[name]) for name, piece in pieces.items()}
        return {name: each if name in self.local else exact(each) for name, each in heads.items()}, tail_next

    def apart(self, joined_TBF: Tensor) -> dict[str, Tensor]:
        """The convolved projections one by one."""
        sizes = [self.parts[name] * self.heads for name in self.convolved]
        return dict(zip(self.convolved, joined_TBF.split(sizes, -1), strict=True))

    def no_tail(self, rows: int) -> Heads | None:
        """What the convolution is told of before the first token: zeros; None where there is none."""
        if self.taps is None:
            return None
        shape = rows, self.heads, self.taps.shape[1] - 1
        return {name: self.taps.new_zeros(*shape, self.parts[name]) for name in self.convolved}

    def by_head(self, piece_TBF: Tensor, features: int) -> Tensor:
        """(T, B, H f) -> (B, H, T, f), in one piece of memory."""
        return piece_TBF.unflatten(-1, (-1, features)).permute(1, 2, 0, 3).contiguous()

    def gate(self, heads: Heads, name: str) -> Tensor:
        """One number a head and token before its squashing, (B, H, T)."""
        return heads[name].squeeze(-1) + exact(self.exchange.mine(self.biases[name]))[:, None]

    def keep(self, heads: Heads, rate: float) -> Tensor:
        """log of the share that the memory keeps at a token (B, H, T); a largest inner `rate` of 0 keeps it all."""
        return F.logsigmoid(self.gate(heads, "keep") + (0.0 if rate else torch.inf))

    def momentum(self, heads: Heads, rate: float) -> Tensor:
        """log of the share of the momentum that goes on (B, H, T); with a largest inner `rate` of 0 nothing does."""
        found = F.logsigmoid(self.gate(heads, "momentum"))
        return found if rate else 0 * found + NOTHING

    def convolve(self, joined_TBF: Tensor, scene: Scene, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The short convolution over this rank's heads, and the last tokens that a row's next part must know."""
        assert self.taps is not None
        each = self.taps.split([self.parts[name] * self.held for name in self.convolved])
        weight = torch.cat([self.exchange.mine(part) for part in each]) if self.exchange.ranks > 1 else self.taps
        starts_TB = None if scene.starts_BT is None else scene.starts_BT.t()
        last = tail_of(joined_TBF, tail, starts_TB, weight.shape[1] - 1) if scene.hand_on else None
        return F.silu(convolve(joined_TBF, weight, tail, starts_TB)), last

    def finish(self, o_BHTK: Tensor, x_TBD: Tensor, heads: Heads) -> Tensor:
        """x + out(o), o normed a head and, where there is a gate, gated."""
        dtype = x_TBD.dtype
        o_BHTK = unit(o_BHTK, self.width**0.5, self.config.layernorm_epsilon * self.width)  # RMS norm
        o_TBF = self.exchange.to_tokens(by_token(o_BHTK.to(dtype)))
        if "gate" in heads:
            o_TBF = o_TBF * F.silu(by_token(heads["gate"]))
        update, _ = self.out(o_TBF)
        return x_TBD + update

    def leaves(self) -> Iterator[Leaf]:
        """norm, projections, biases, taps, out."""
        yield from self.norm.leaves()
        start = 0
        for name, features in self.parts.items():
            rows = {"start": start, "length": features * self.held}
            yield Leaf(
                f"{name}.weight", self.inward.weight, **rows, shard=0, linear=self.inward, scattered=self.norm.partial
            )
            start += features * self.held
        for name, bias in self.biases.items():
            yield Leaf(f"{name}.bias", bias, shard=0)
        start = 0
        for name in self.convolved:
            length = self.parts[name] * self.held
            yield Leaf(f"convolution.{name}", self.taps, start=start, length=length, shard=0)  # type: ignore[arg-type]
            start += length
        yield Leaf("out.weight", self.out.weight, shard=1, linear=self.out)


def exact(tensor: Tensor) -> Tensor:
    """In float32 at least: what memories compute, their states and their solves are not for half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def by_token(part_BHTf: Tensor) -> Tensor:
    """(B, H, T, f) -> (T, B, H f)."""
    return part_BHTf.permute(2, 0, 1, 3).flatten(2)


def tail_of(x_TBF: Tensor, tail: Tensor | None, starts_TB: Tensor | None, count: int) -> Tensor:
    """The last `count` tokens, zero where a document began after them."""
    before = x_TBF.new_zeros(count, *x_TBF.shape[1:]) if tail is None else tail
    last = torch.cat([before, x_TBF])[-count:] if count else x_TBF[:0]
    if starts_TB is None or not count:
        return last
    padded = torch.cat([starts_TB.new_zeros(count, starts_TB.shape[1]), starts_TB])[-count:]
    later = padded.flip(0).cumsum(0).flip(0) - padded.long()  # documents that begin after each of the tokens
    return last.masked_fill((later > 0).unsqueeze(-1), 0)


def stacked(up: Sequence[Tensor], heads: int) -> Tensor:
    """Parameters (H M, K) of N memories -> (1, H, N, M, K)."""
    return exact(torch.stack([each.unflatten(0, (heads, -1)) for each in up], 1).unsqueeze(0))
