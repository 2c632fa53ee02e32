"""Every way in which operators launch their kernels, found by running their own host code on tensors without memory.

`launches()` of each operator are the ones that matter for speed, each held against a budget. These here are all others too:
dtypes, widths, documents, momentum, limits, what is absent. `python -m nlscale_kernels.aot --launched` compiles them.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import jit

from nlscale_kernels import tuned
from nlscale_kernels.arguments import NARROW
from nlscale_kernels.level_step import triton as level_step
from nlscale_kernels.linear_memory import Tokens, memory
from nlscale_kernels.linear_memory import triton as linear_memory
from nlscale_kernels.linear_memory import triton_backward as linear_backward
from nlscale_kernels.linear_memory.op import WIDEST
from nlscale_kernels.mlp_memory import triton as mlp_memory
from nlscale_kernels.mlp_memory.glue import ACTIVATIONS
from nlscale_kernels.mlp_memory.step import Step
from nlscale_kernels.newton_schulz import triton as newton_schulz
from nlscale_kernels.newton_schulz.op import DTYPES
from nlscale_kernels.self_modifying import given, op, resident
from nlscale_kernels.self_modifying import triton as self_modifying
from nlscale_kernels.self_modifying import triton_backward as walk
from nlscale_kernels.triton_build import Config, Launch

B = 2  # rows
SIZES = ((24, 12, 1, 1), (64, 64, 4, 3), (128, 128, 4, 3))  # head widths, tokens of a chunk, heads, chunks
OPTIONS = ("num_warps", "num_stages")
YES_NO = (False, True)
Call = Callable[[], Any]


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def of_level_step(_: int) -> Iterator[Call]:
    """Gradients and copies of every dtype, one level and several; even, odd and very long shards."""
    for count, several, clear, gradient in itertools.product((2**20, 2**20 + 2, 2**31), YES_NO, YES_NO, NARROW):
        master, table = made(count), made(2, 16)
        blocks = made(1024, dtype=torch.int32) if several else None
        direction = made(count, dtype=gradient)
        for copy in (None, *(made(count, dtype=dtype) for dtype in NARROW)):
            yield partial(level_step.adamw, master, direction, master, master, copy, table, blocks, clear)
            yield partial(level_step.descend, master, direction, copy, table, blocks)
        for sums in (None, master):
            yield partial(level_step.momenta, direction, master, sums, sums, table, blocks, clear)


def of_linear_memory(_: int) -> Iterator[Call]:
    """Every rule, dtype, width and chunk, with documents and without, forward and backward."""
    for rule, dtype, (width, wanted, H, N), documents in itertools.product(memory.RULES, NARROW, SIZES, YES_NO):
        chunk = min(wanted, WIDEST["chunk"])
        tokens = N * chunk
        q, scalar = made(B, H, tokens, width), made(B, H, tokens)
        starts = made(B, tokens, dtype=torch.bool) if documents else None
        tokens_of = Tokens(q, q, q, scalar, scalar, starts)
        found = memory.prepared(rule, tokens_of, chunk, made(H, width, width), None).given
        told = found._replace(**{name: getattr(found, name).to(dtype) for name in ("q", "k", "v")})
        yield partial(linear_memory.matrix_memory, told)
        yield partial(linear_backward.gradients, told, q.to(dtype), told.state)


def of_mlp_memory(_: int) -> Iterator[Call]:
    """Every activation and dtype, vector and gate memories, with and without keys, momentum, limits."""
    for dtype, (width, N) in itertools.product(NARROW, ((24, 1), (256, 3))):
        for kind in ACTIVATIONS:
            before = made(B, 4, N, 64, width * (1 + (kind == "swiglu")), dtype=dtype)
            units = made(B, 4, N, 64, width, dtype=dtype)
            yield partial(mlp_memory.active, before, kind)
            yield partial(mlp_memory.second, before, units, units, kind)
            for beside in (None, before):
                yield partial(mlp_memory.returned, before, units, beside, kind)
        for columns, count, targets in itertools.product((width, 1), (1, 2), {1, N}):
            error, target = (made(B, 4, size, 64, columns, dtype=dtype) for size in (N, targets))
            weights, heard = made(B, 4, 64, count, dtype=dtype), made(B, 4, N, 64, count * columns, dtype=dtype)
            for key in (None, made(B, 4, 64, columns, dtype=dtype)):
                yield partial(mlp_memory.errors, error, target, key, weights)
            yield partial(mlp_memory.of_errors, heard, error, weights, error)
        shapes = ((8, 8), (width, 4 * width))  # of one slice and of several
        for shape, momentum, apart, keeps, limit in itertools.product(shapes, YES_NO, YES_NO, YES_NO, (0.0, 1.0)):
            if momentum or not apart:
                matrix, factor = made(B, 4, N, *shape, dtype=dtype), made(B, 4, dtype=dtype)
                held, left = (matrix, factor) if apart else (None, None)
                speed, carry = (matrix, factor) if momentum else (None, None)
                keep, d_then = factor if keeps else None, matrix if momentum else matrix.new_empty(0)
                step = Step(matrix, speed, matrix, held, keep, carry, left, -1.0, limit)
                yield partial(mlp_memory.stepped, step)
                yield partial(mlp_memory.step_gradients, step, matrix, d_then)


def of_newton_schulz(_: int) -> Iterator[Call]:
    """Every dtype that has a kernel, wide and narrow matrices, transposed too, with and without a term beside."""
    for dtype, (rows, columns), turned in itertools.product(DTYPES, ((1, 64), (32, 96), (1024, 1024)), YES_NO):
        x = made(B, columns, rows, dtype=dtype).mT if turned else made(B, rows, columns, dtype=dtype)
        for beside in (None, made(B, rows, rows, dtype=dtype)):
            yield partial(newton_schulz.symmetric_product, x, x, beside, 1.5, 0.5)


def of_self_modifying(arch: int) -> Iterator[Call]:
    """Every dtype, width and chunk with documents and without; the walk with momentum and without."""
    for dtype, (width, chunk, H, _), documents in itertools.product(NARROW, SIZES, YES_NO):
        k, scalar = made(B, H, chunk, width, dtype=dtype), made(B, H, chunk)
        document = made(B, chunk, dtype=torch.int32) if documents else None
        told = op.Given(k, scalar, scalar, scalar, scalar, document)
        yield partial(self_modifying.reach, told)
        yield partial(self_modifying.gradients, told, k, k)
    sizes = [each for each in SIZES if each[0] <= given.WIDEST] if arch // 10 in given.ROOM else []
    for (width, chunk, H, N), documents, momentum, clip in itertools.product(sizes, YES_NO, YES_NO, (0.0, 1.0)):
        tokens = N * chunk
        z, scalar = made(B, H, tokens, width), made(B, H, tokens)
        net, first = made(B, H, width, width), made(H, width, width)
        fresh = made(B, tokens, dtype=torch.bool) if documents else None
        hold, speed = (scalar, net) if momentum else (None, None)
        chunks = made(B, H, N, width, width), made(B, H, N, 4)
        each = (z, z, z, scalar, z, scalar, hold, *chunks, fresh, net, net, speed, speed, first, first, chunk, clip)
        whole = given.Given._make(each)
        ends = [z, net, net, *([net, net] if momentum else [])]
        yield partial(walk.walked, whole)
        yield partial(walk.gradients, whole, made(resident.kept_by(whole)), ends)


CALLS: Mapping[str, Callable[[int], Iterator[Call]]] = {
    "level_step": of_level_step,
    "linear_memory": of_linear_memory,
    "mlp_memory": of_mlp_memory,
    "newton_schulz": of_newton_schulz,
    "self_modifying": of_self_modifying,
}


@contextmanager
def recorded(arch: int) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """What is launched meanwhile, as if on a device of this architecture that nothing was tuned for."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def launch(kernel: Any, _: Any) -> Callable[..., None]:
        return lambda *arguments, **keywords: seen.append((kernel, arguments, keywords))

    with (
        mock.patch.object(jit.KernelInterface, "__getitem__", launch),
        mock.patch.object(tuned, "device_facts", lambda _: ("none", arch)),
    ):
        yield seen


def launches_of(operator: str, arch: int) -> list[Launch]:
    """Each distinct one, in the order in which they are met."""
    with recorded(arch) as seen:
        for call in CALLS[operator](arch):
            call()
    found: dict[Any, Launch] = {}
    for kernel, arguments, keywords in seen:
        given_as = tuple(value.dtype if isinstance(value, Tensor) else value for value in arguments)
        warps, stages = (keywords.pop(name) for name in OPTIONS)
        kinds = tuple(value if isinstance(value, torch.dtype | None) else kind_of(value) for value in given_as)
        key = kernel.fn.__name__, kinds, tuple(sorted(keywords.items())), warps, stages
        name = f"{kernel.fn.__name__.removesuffix('_kernel')} {len(found)}"
        walks = kernel.fn.__module__.endswith("self_modifying.triton_backward")
        config = Config({}, warps, stages)
        found.setdefault(key, Launch(name, kernel, given_as, keywords, [config], spills=2**16, turned=walks))
    return list(found.values())


def kind_of(number: float) -> str:
    """What Triton compiles for numbers like this."""
    if isinstance(number, float):
        return "float"
    return "1" if number == 1 else f"{'wide ' * (number >= 2**31)}{'16' * (number % 16 == 0)}"
