"""Gradients that somebody differentiates in turn: through torch's own graph, not through a backward written out; and what a
forward beside such a backward may give.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def asked() -> bool:
    """In a backward: whether its own result will be differentiated (`create_graph`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def anew(x: Tensor) -> Tensor:
    """What a `torch.autograd.Function` gives, where it may be the very tensor that an operation was given, as of `add_`, or
    of `to` without a change: torch 2.11 has no gradient for such a result in a compiled function.
    """
    return x.view_as(x) if torch.compiler.is_compiling() else x


def gradients(
    function: Callable[..., Sequence[Tensor | None]], given: Sequence[Any], of: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Of the tensors in `given`, None for others, from those of what function(*given) returns; differentiable in turn."""
    views = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in given]  # one may come twice
    wanted = [x for x in views if isinstance(x, Tensor) and x.requires_grad]
    ends = [(y, d) for y, d in zip(function(*views), of, strict=True) if y is not None and d is not None]
    ends = [(y, d) for y, d in ends if y.requires_grad]
    outputs, grads = [y for y, _ in ends], [d for _, d in ends]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True) if wanted else [])
    return [next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in views]
