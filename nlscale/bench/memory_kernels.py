"""Kernels of memories against torch: its operators one by one, and compiled by torch.compile."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from nlscale_kernels.linear_memory import Tokens, fla, matrix_memory, reference
from nlscale_kernels.linear_memory.reference import Given
from nlscale_kernels.mlp_memory import Net, Step, gathered
from nlscale_kernels.mlp_memory import op as mlp_memory
from nlscale_kernels.mlp_memory import reference as plain
from nlscale_kernels.mlp_memory import step as memory_step
from nlscale_kernels.mlp_memory.glue import TORCH
from nlscale_kernels.mlp_memory.step import stepped
from nlscale_kernels.self_modifying import resident
from nlscale_kernels.tune import tokens_of, walk_of
from torch import Tensor

from nlscale.bench import peers
from nlscale.bench.table import Row, Timer, at_least, beside, by_compiler

CHUNK = 64  # of the matrix memory
SLOWER = 1.10  # than flash-linear-attention's delta rule, that ours with frozen gradients may be at most
RATE = 100.0  # 1e12 operations a second of the rule forward
NAMES = {"delta": "delta rule", "dgd_frozen": "DGD with gradients at the chunk's anchor"}
LARGE = {1024: 0.45, 2048: 0.58}  # tokens of a write: share of the rate of one large product


class Shape(NamedTuple):
    """Of a matrix memory."""

    rows: int
    heads: int
    tokens: int
    width: int


def matrix_memories(shape: Shape, device: str, timer: Timer, fastest: float, rule: str = "delta") -> list[Row]:
    """The gated delta rule, or DGD with gradients at the chunk's anchor: forward alone, and with backward.

    `fastest`: multiplications a second of one large product.
    """
    rows, heads, tokens, width = shape
    narrow = torch.bfloat16 if device == "cuda" else torch.float32
    given = tokens_of(rows, heads, tokens, min(CHUNK, tokens), width, device, narrow, rule)
    wanted = [x.requires_grad_() for x in given if isinstance(x, Tensor)]
    d_o, d_last = torch.randn_like(given.v), torch.randn_like(given.state)

    def eager_form(given: Given) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # products in bfloat16, as ours
            return reference.matrix_memory(given)

    compiled = by_compiler(eager_form, device)

    def forward(form: Callable[[Given], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return form(given)

        return run

    def both(form: Callable[[Given], Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(form(given), wanted, [d_o, d_last], allow_unused=True)

    forms = (matrix_memory, eager_form, compiled)
    own, eager, fast, own_both, eager_both, fast_both = timer(
        [make(form) for make in (forward, both) for form in forms]
    )
    name = f"{NAMES[rule]}, {rows} x {heads} x {tokens} x {width}"
    multiplied = rows * heads * tokens * (3 * width**2 + 5 * CHUNK * width + CHUNK**2)
    rate = 2 * multiplied / own / 1e12
    theirs = timer(by_fla(shape, device)) if device == "cuda" and fla.available() else []
    least = 0.95 if rule == "delta" else 1 / SLOWER
    return [
        at_least(f"{name}, torch / own", eager, "s", own, 10.0),
        at_least(f"{name}, torch.compile / own", fast, "s", own, 4.0),
        at_least(f"{name}, with backward, torch / own", eager_both, "s", own_both, 8.0),
        at_least(f"{name}, with backward, torch.compile / own", fast_both, "s", own_both, 3.0),
        Row(f"{name}, operations", rate, "1e12 a second", None, None, f">= {RATE:g}", rate >= RATE),
        beside(f"{name}, share of a product's rate", multiplied / own / 1e12, "T/s", fastest / 1e12),
        *(
            at_least(f"{name}{more}, flash-linear-attention's delta rule / own", fla_took, "s", own_took, least)
            for more, fla_took, own_took in zip(("", ", with backward"), theirs, (own, own_both), strict=False)
        ),
    ]


def by_fla(shape: Shape, device: str, kernel: fla.Kernel | None = None) -> list[Callable[[], Any]]:
    """The delta rule forward, and with backward, as flash-linear-attention has it; `kernel`: its function, None: as
    installed.
    """
    rows, heads, tokens, width = shape
    q, k, v = torch.randn(3, rows, heads, tokens, width, device=device).unbind(0)
    rate, log_keep = torch.rand(2, rows, heads, tokens, device=device).unbind(0)
    each = (q, F.normalize(k, dim=-1), v, rate, -log_keep / 16)
    leaves = [x.detach().requires_grad_() for x in each]
    initial = torch.zeros(heads, width, width, device=device)

    def forward() -> Any:
        with torch.no_grad():
            return fla.by_fla("delta", Tokens(*each), CHUNK, initial, kernel=kernel)

    def both() -> Any:
        o, _ = fla.by_fla("delta", Tokens(*leaves), CHUNK, initial, kernel=kernel)
        return torch.autograd.grad(o, leaves, v, allow_unused=True)

    return [forward, both]


def mlp_memories(chunk: int, width: int, device: str, timer: Timer, fastest: float) -> list[Row]:
    """What a chunk of 4 heads writes into SwiGLU memories of a width as large as theirs; forward, and with backward.

    `fastest`: multiplications a second of one large product.
    """
    narrow = torch.bfloat16 if device == "cuda" else torch.float32

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(narrow) / shape[-1] ** 0.5

    net = Net(numbers(4, 1, 1, 2 * width, width), numbers(4, 1, 1, width, width))
    key, target, weight = numbers(4, 1, chunk, width), numbers(4, 1, 1, chunk, width), numbers(4, 1, chunk)

    def write(net: Net, form: Callable[..., Any]) -> Any:
        return form(net, key, target, key, [weight], "swiglu")

    def eager() -> Any:
        return write(net, plain.gathered)

    def both(form: Callable[..., Any]) -> Callable[[], Any]:
        """The double backward: gradients through a write, which is a gradient."""

        def run() -> Any:
            first, (second,) = write(net, form)
            return torch.autograd.grad((first, second), leaves, (first.detach(), second.detach()))

        return run

    compiled = by_compiler(eager, device)
    with torch.no_grad():
        own, plainly, fast = timer([lambda: write(net, gathered), eager, compiled])
    leaves = [x.requires_grad_() for x in (*net, key, target, weight)]
    own_both, plainly_both = timer([both(gathered), both(plain.gathered)])
    name, rate = f"writes of {chunk} tokens, SwiGLU memory {width} x {width}", multiplications(4, chunk, width) / own
    said = f"{name}, share of a product's rate", rate / 1e12, "T/s", fastest / 1e12
    return [
        at_least(f"{name}, torch / own", plainly, "s", own, 1.8 if chunk <= 1024 else 1.4),
        at_least(f"{name}, torch.compile / own", fast, "s", own, 1.15 if chunk <= 256 else 1.10),
        at_least(f"{name}, with backward, torch / own", plainly_both, "s", own_both, 1.0),
        at_least(*said, LARGE[chunk]) if chunk in LARGE else beside(*said),
    ]


def multiplications(heads: int, chunk: int, width: int) -> int:
    """Of what a chunk writes into SwiGLU memories: keys to gates and units and the way back, 2 K^2 a token each; units to
    errors, back, and what is written there, K^2 each.
    """
    return heads * chunk * 7 * width**2


def between_products(elements: int, device: str, timer: Timer) -> list[Row]:
    """What is as fast as memory: the derivative of SwiGLU units, and the step of memories' weights, momentum and limit
    included; bytes that must be moved a second, of those of a copy.
    """
    narrow = torch.bfloat16 if device == "cuda" else torch.float32
    units = max(elements // 2**15, 1)
    before, inward = (torch.randn(4, 4, 1, units, columns, device=device).to(narrow) for columns in (4096, 2048))
    state, speed, written = (torch.randn(4, 4, 1, max(elements // 2**14, 1), 1024, device=device) for _ in range(3))
    factors = torch.rand(2, 4, 4, device=device).unbind(0)
    step = Step(state, speed, written, None, factors[0], factors[1], None, -1.0, 1.0)
    plainly, moved = TORCH["swiglu"], partial(stepped, step)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    forms: dict[str, Callable[[], object]] = {
        "swiglu": lambda: mlp_memory.returned(before, inward, None, "swiglu"),
        "swiglu by torch": lambda: plainly.returned(before, inward),
        "swiglu compiled": by_compiler(lambda: plainly.returned(before, inward), device),
        "step": lambda: memory_step.forward(*step),
        "step by torch": moved,
        "step compiled": by_compiler(moved, device),
        "copy": lambda: target.copy_(source),
    }
    gate, up = (half.contiguous() for half in before.chunk(2, -1))
    with torch.no_grad():
        times = timer([*forms.values(), *peers.swiglu_backward(gate, up, inward.clone())])
    took, peer = dict(zip(forms, times, strict=False)), times[len(forms) :]
    copying = 2 * source.nbytes / took["copy"] / 1e12
    passes = 7  # over memory as large as a state: the norm of what is added is known when two of three have been read
    rates = {
        "swiglu": (2 * before.nbytes + inward.nbytes) / took["swiglu"] / 1e12,
        "step": passes * state.nbytes / took["step"] / 1e12,
    }
    said = {"swiglu": "derivative of SwiGLU units", "step": "step of memories' weights"}
    return [
        *(at_least(f"{said['swiglu']}, liger-kernel / own", each, "s", took["swiglu"], 1.0) for each in peer),
        *(
            row
            for name, (eager, fast) in {"swiglu": (3.0, 0.97), "step": (2.5, 1.15)}.items()
            for row in (
                at_least(f"{said[name]}, torch / own", took[f"{name} by torch"], "s", took[name], eager),
                at_least(f"{said[name]}, torch.compile / own", took[f"{name} compiled"], "s", took[name], fast),
                at_least(f"{said[name]}, bytes a second / a copy's", rates[name], "TB/s", copying, 0.9),
            )
        ),
    ]


def walks(shape: Shape, device: str, timer: Timer) -> list[Row]:
    """Self-modifying Titans' main memory over a run of chunks: one kernel, or products and the kernels between them."""
    rows, heads, tokens, width = shape
    chunk = min(CHUNK, tokens)
    given = walk_of(rows, heads, tokens // chunk, chunk, width, device)
    wanted = [x.requires_grad_() for x in given if isinstance(x, Tensor)]
    of = [torch.randn_like(x) for x in resident.looped(given)]

    def own() -> tuple[Tensor, ...]:
        return tuple(resident.resident(*given)[: len(of)])

    def by_chunks() -> tuple[Tensor, ...]:
        return resident.looped(given)

    def alone(form: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return form()

        return run

    def both(form: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(form(), wanted, of, allow_unused=True)

    mine, theirs, mine_both, theirs_both = timer([make(form) for make in (alone, both) for form in (own, by_chunks)])
    name = f"HOPE's memory, {rows} x {heads} x {tokens} x {width}"
    return [
        at_least(f"{name}, by chunks / on chip", theirs, "s", mine, 3.0),
        at_least(f"{name}, with backward, by chunks / on chip", theirs_both, "s", mine_both, 2.0),
    ]
