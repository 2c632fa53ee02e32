"""Times every config of the kernels that have several, on this machine's GPU, and writes tuned/DEVICE.tritonXY.json.

    python -m nlscale_kernels.tune

Every config is first held against float64; one that is wrong is named and left out.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from nlscale_kernels.linear_memory import Tokens
from nlscale_kernels.linear_memory import reference as matrix
from nlscale_kernels.linear_memory import triton as memory_forward
from nlscale_kernels.linear_memory import triton_backward as memory_backward
from nlscale_kernels.linear_memory.memory import prepared
from nlscale_kernels.linear_memory.reference import Given
from nlscale_kernels.newton_schulz import reference
from nlscale_kernels.newton_schulz import triton as products
from nlscale_kernels.self_modifying import op as solve
from nlscale_kernels.self_modifying import resident
from nlscale_kernels.self_modifying import triton as solve_kernels
from nlscale_kernels.self_modifying import triton_backward as walk_kernels
from nlscale_kernels.triton_build import Config
from nlscale_kernels.tuned import FOLDER, device_facts, file_of

SIDES = (256, 512, 1024, 2048, 4096, 8192)
TOLERANCE = 1e-2  # relative norm, bfloat16
FORWARD = {"apply": memory_forward.APPLY, "states": memory_forward.STATES, "outputs": memory_forward.OUTPUTS}
BACKWARD = {
    "listen": memory_backward.LISTEN,
    "carry": memory_backward.CARRY,
    "read": memory_backward.READ,
    "spread": memory_backward.SPREAD,
}


def best(
    configs: Sequence[Config],
    run: Callable[[Config], Tensor],
    expected: Tensor,
    time: Callable[[Callable[[], Any]], float],
    tolerance: float = TOLERANCE,
) -> dict[str, Any] | None:
    """The fastest config that is right, and its microseconds; None where none is."""
    found = []
    for place, config in enumerate(configs):
        try:
            error = float((run(config).double() - expected).norm() / expected.norm())
        except triton.OutOfResources as refused:
            print(f"  {refused}: {config}", file=sys.stderr)
            continue
        if not error <= tolerance:
            print(f"  wrong by {error:.1e}: {config}", file=sys.stderr)
            continue
        found.append((time(lambda config=config: run(config)), place))  # type: ignore[misc]
    if not found:
        return None
    milliseconds, place = min(found)
    config = configs[place]
    chosen = {"tiles": dict(config.tiles), "warps": config.warps, "stages": config.stages}
    return {"config": chosen, "microseconds": round(1000 * milliseconds, 1)}


def symmetric_products(
    device: str, sides: Sequence[int], arch: int, time: Callable[..., float]
) -> list[dict[str, Any]]:
    """Of square matrices."""
    fitting, found = [each for each in products.CONFIGS if each.least <= arch], []
    for side in sides:
        x = torch.randn(1, side, side, device=device, dtype=torch.bfloat16) / side**0.5
        expected = reference.symmetric_product(x.double(), x.double())

        def run(config: Config, x: Tensor = x) -> Tensor:
            return products.symmetric_product(x, x, config=config)

        chosen = best(fitting, run, expected, time)
        if chosen is not None:
            found.append({"shape": {"rows": side}, **chosen})
            print(f"symmetric_product, {side} rows: {chosen}")
    return found


def tokens_of(
    rows: int,
    heads: int,
    tokens: int,
    chunk: int,
    width: int,
    device: str,
    dtype: torch.dtype,
    rule: str = "delta",
) -> Given:
    """Random ones of a rule, the gated delta rule's unless it is said, one document a row."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, v = (numbers(rows, heads, tokens, width) for _ in range(3))
    rate, keep = numbers(rows, heads, tokens).sigmoid() / 2, F.logsigmoid(numbers(rows, heads, tokens) + 4)
    initial = torch.zeros(heads, width, width, device=device)
    given, _ = prepared(rule, Tokens(q, F.normalize(k, dim=-1), v, rate, keep), chunk, initial, None)
    return given._replace(q=given.q.to(dtype), k=given.k.to(dtype), v=given.v.to(dtype))


def runs(given: Given, d_o: Tensor, d_last: Tensor) -> dict[str, Callable[[Config], Tensor]]:
    """By kernel of matrix_memory: outputs, or the gradient of keys, with this kernel's config, the others as chosen."""

    def forward(place: int) -> Callable[[Config], Tensor]:
        def run(config: Config) -> Tensor:
            apply, states, outputs = (config if place == i else None for i in range(3))
            return memory_forward.matrix_memory(given, (apply, states, outputs))[0]

        return run

    def backward(place: int) -> Callable[[Config], Tensor]:
        return lambda config: memory_backward.gradients(
            given, d_o, d_last, [config if place == i else None for i in range(5)]
        )[1]

    found = {name: forward(place) for place, name in enumerate(FORWARD)}
    return found | {name: backward(place) for place, name in enumerate(BACKWARD)}


def matrix_memories(
    device: str, shape: tuple[int, int, int, int], widths: Sequence[int], arch: int, time: Callable[..., float]
) -> dict[str, list[dict[str, Any]]]:
    """Every kernel of matrix_memory by turns, in float32 as the model gives it; `shape`: rows, heads, tokens, chunk."""
    found: dict[str, list[dict[str, Any]]] = {}
    for width in widths:
        given = tokens_of(*shape, width, device, torch.float32)
        wide = Given._make(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)
        d_o, d_last = torch.randn_like(given.v), torch.zeros_like(given.state)
        outputs = matrix.matrix_memory(wide)[0]
        keys = matrix.gradients(wide, d_o.double(), d_last.double()).k
        for name, run in runs(given, d_o, d_last).items():
            configs = [each for each in (FORWARD | BACKWARD)[name] if each.least <= arch]
            chosen = best(configs, run, outputs if name in FORWARD else keys, time)
            if chosen is not None:
                found.setdefault(f"matrix_memory.{name}", []).append({"shape": {"width": width}, **chosen})
                print(f"matrix_memory.{name}, width {width}: {chosen}")
    return found


def solves(
    device: str, shape: tuple[int, int, int], widths: Sequence[int], arch: int, time: Callable[..., float]
) -> list[dict[str, Any]]:
    """The way back through the solve that memories share, in bfloat16; `shape`: rows, heads, tokens of a chunk."""
    configs, found = [each for each in solve_kernels.GRADIENT if each.least <= arch], []
    for width in widths:
        generator = torch.Generator(device).manual_seed(0)
        k, d_reach = (torch.randn(*shape, width, generator=generator, device=device) for _ in range(2))
        erase, after, held = (torch.rand(shape, generator=generator, device=device) for _ in range(3))
        kept = -0.1 * held.cumsum(-1)  # binary logarithm of what is left; before a token's own share and after it
        given = solve.Given(F.normalize(k, dim=-1), erase, kept + 0.1 * held, kept, after, None)
        narrow = given._replace(k=given.k.bfloat16())  # the reference begins from what was rounded
        wide = solve.Given._make(x if x is None else x.double() for x in narrow)
        ends = (solve.reached(wide).bfloat16(), d_reach.bfloat16())
        keys = solve.gradients(wide, *(x.double() for x in ends)).k

        def run(config: Config, narrow: solve.Given = narrow, ends: tuple[Tensor, Tensor] = ends) -> Tensor:
            return solve_kernels.gradients(narrow, *ends, (None, config)).k

        chosen = best(configs, run, keys, time)
        if chosen is not None:
            found.append({"shape": {"width": width}, **chosen})
            print(f"reach.gradients, width {width}: {chosen}")
    return found


def walk_of(rows: int, heads: int, chunks: int, chunk: int, width: int, device: str) -> resident.Given:
    """A random run of tokens of self-modifying Titans' main memory, with momentum and a limit, one document a row."""
    generator, tokens = torch.Generator(device).manual_seed(0), chunks * chunk

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, v, reach = (F.normalize(numbers(rows, heads, tokens, width), dim=-1) for _ in range(4))
    rate, write, hold = (numbers(rows, heads, tokens).sigmoid() for _ in range(3))
    turn = torch.eye(width, device=device) + 0.1 / width**0.5 * numbers(rows, heads, chunks, width, width)
    states = [numbers(rows, heads, width, width) / width**0.5 for _ in range(2)]
    speeds = [0.1 * x for x in states]
    firsts = [x[0].clone() for x in states]
    factors = numbers(rows, heads, chunks, 4).sigmoid()
    given = (q, k, v, 0.1 * rate, reach, write, hold, turn, factors, None, *states, *speeds, *firsts, chunk, 1.0)
    return resident.Given._make(given)


def walks(
    device: str, shape: tuple[int, int, int, int], widths: Sequence[int], arch: int, time: Callable[..., float]
) -> dict[str, list[dict[str, Any]]]:
    """Both kernels of the walk whose weights stay on chip; `shape`: rows, heads, chunks, tokens of a chunk.

    Nothing where one has no config that is right: memories go chunk by chunk there.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in resident.KERNELS}
    forwards, backwards = (
        [each for each in configs if each.least <= arch] for configs in (walk_kernels.FORWARD, walk_kernels.BACKWARD)
    )
    for width in widths:
        given = walk_of(*shape, width, device)
        wide = resident.Given._make(x.double() if isinstance(x, Tensor) else x for x in given)
        said = resident.looped(wide)
        of = [torch.randn_like(x) for x in said]

        def forward(config: Config, given: resident.Given = given) -> Tensor:
            return walk_kernels.walked(given, config).said

        first = best(forwards, forward, said[0], time)
        if first is None:
            return {}
        kept, narrow = walk_kernels.walked(given, Config(**first["config"])).kept, [x.float() for x in of]

        def backward(
            config: Config, given: resident.Given = given, kept: Tensor = kept, narrow: list[Tensor] = narrow
        ) -> Tensor:
            return walk_kernels.gradients(given, kept, narrow, config)[1]

        second = best(backwards, backward, resident.gradients(wide, of)[1], time)
        if second is None:
            return {}
        for name, chosen in zip(resident.KERNELS, (first, second), strict=True):
            found[name].append({"shape": {"width": width}, **chosen})
            print(f"{name}, width {width}: {chosen}")
    return found


def main() -> int:
    """Writes the file; 2 where there is no GPU."""
    if not torch.cuda.is_available():
        print("there is no NVIDIA GPU here, so nothing can be timed", file=sys.stderr)
        return 2
    name, arch = device_facts(torch.cuda.current_device())
    time = triton.testing.do_bench
    found = {"symmetric_product": symmetric_products("cuda", SIDES, arch, time)}
    found |= matrix_memories("cuda", (4, 16, 4096, 64), (64, 128), arch, time)
    found["reach.gradients"] = solves("cuda", (4, 64, 64), (32, 64, 128), arch, time)
    found |= walks("cuda", (4, 16, 8, 64), (32, 64), arch, time) if arch >= 90 else {}
    path = FOLDER / file_of(name)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
