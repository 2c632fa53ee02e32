"""What other libraries do of the same, where they are installed: contestants for the table of kernels.

None of them is a dependency. Each is called once before it is timed: one that does not run here is named and left out.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Contestant = Callable[[], object]


def usable(package: str, make: Callable[[], Contestant]) -> list[Contestant]:
    """The contestant, or none where the package is absent, or present and fails at the first call."""
    if find_spec(package) is None:
        return []
    try:
        contestant = make()
        contestant()
    except Exception as error:  # of other people's code, whatever it is: the table goes on
        print(f"{package} is installed and does not run here: {type(error).__name__}: {error}", flush=True)
        return []
    return [contestant]


def fused_adam(copy: Tensor, gradient: Tensor, hyper: Mapping[str, Any]) -> list[Contestant]:
    """A step of TransformerEngine's FusedAdam (2.20; Apache-2.0) on weights in bfloat16 with float32 masters of its own.

    `copy`, `gradient`: (n,) in bfloat16; the weights are moved.
    """

    def make() -> Contestant:
        from transformer_engine.pytorch.optimizers import FusedAdam  # type: ignore[import-not-found]

        parameter = torch.nn.Parameter(copy)
        parameter.grad = gradient
        optimizer = FusedAdam([parameter], adam_w_mode=True, master_weights=True, **hyper)
        return lambda: optimizer.step()

    return usable("transformer_engine", make)


def symmetric(x_KNM: Tensor) -> list[Contestant]:
    """x x^T by quack's symmetric product (quack-kernels 0.6.5; Apache-2.0)."""

    def make() -> Contestant:
        from quack.gemm_interface import gemm_symmetric  # type: ignore[import-not-found]

        return lambda: gemm_symmetric(x_KNM, x_KNM.mT)

    return usable("quack", make)


def orthogonal(x_KNM: Tensor, iterations: int) -> list[Contestant]:
    """Newton-Schulz by gram-newton-schulz (0.1.6; MIT) on quack's products: the Gram form where the matrices are not square.

    No graph is captured, as ours is timed without one.
    """

    def make() -> Contestant:
        from gram_newton_schulz import GramNewtonSchulz  # type: ignore[import-not-found]
        from nlscale_kernels.newton_schulz import QUINTIC

        theirs = GramNewtonSchulz(
            ns_coefficients=[list(QUINTIC)] * iterations,
            gram_newton_schulz_reset_iterations=[2],
            compile_kwargs={"fullgraph": True, "dynamic": False},
        )
        return lambda: theirs(x_KNM)

    return usable("gram_newton_schulz", make)


def swiglu_backward(gate: Tensor, up: Tensor, of: Tensor) -> list[Contestant]:
    """The derivative of SwiGLU units by liger-kernel (0.8; BSD-2), which writes over `gate` and `up`, (..., n)."""

    def make() -> Contestant:
        from liger_kernel.ops.swiglu import swiglu_backward

        return lambda: swiglu_backward(gate, up, of)

    return usable("liger_kernel", make)
