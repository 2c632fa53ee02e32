"""What every `triton.py` shares: one source for a GPU, for Triton's interpreter and for the compiler without a GPU.

The interpreter reads TRITON_INTERPRET when triton is first imported. Its bfloat16 tensors are raw bits, so products take
their operands in float32 there, which is exact. Kernels load, compute in float32 and store; they address in int64, and
they use plain pointers with masks: block pointers are gone from Triton 3.9.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton import knobs

INTERPRET = bool(knobs.runtime.interpret)


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: tile sizes by their names, warps, stages of its pipelined loads."""

    tiles: Mapping[str, int]
    warps: int = 4
    stages: int = 2
    least: int = 80  # the least architecture that has room for it

    def options(self) -> dict[str, Any]:
        """As keywords of a launch."""
        return {**self.tiles, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Launch:
    """One way in which a kernel is launched: what is compiled ahead of time and held against a budget."""

    name: str
    kernel: Any  # a triton.JITFunction
    arguments: Sequence[Any]  # a dtype stands for an aligned pointer; numbers for themselves; None for what is absent
    constants: Mapping[str, Any]
    configs: Sequence[Config]
    product: bool = False  # tensor cores must appear in the machine code
    stream: bool = False  # loads and stores of 16 bytes must
    registers: int = 255  # at most
    spills: int = 0  # bytes, at most
    turned: bool = False  # products may take transposed sums (turned.py)


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a b + c in float32. UPCAST: under the interpreter."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision=PRECISION)
