"""The gated delta rule by flash-linear-attention's kernels (fla-core, MIT), where somebody prefers them on a GPU.

Its rule is S <- a S (I - b k k^T) + b v k^T with tokens before heads and states (K, V): ours with b = e / a and value a v.
Names, shapes and the scale are those of fla-core 0.6.0.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nlscale_kernels.linear_memory.memory import Tokens, linear_memory
from nlscale_kernels.turned import doubtful

Kernel = Callable[..., tuple[Tensor, Tensor]]
VALUES = {"delta": 1.0, "dgd": 0.5}  # rules that are its own: how much of a value, at 1 / value times the rate
LEAST = -60.0  # log of the share of a state that is kept: below it nothing of the state is left, and e / a has no end


def available() -> bool:
    """Whether fla-core is installed."""
    return find_spec("fla") is not None


def refused(triton: str, capability: tuple[int, int]) -> str:
    """Why its backward pass would refuse a GPU by this version of Triton; empty where it would not."""
    said = f"fla-core has no gradients on Hopper GPUs by Triton 3.4 to 3.7.0, here {triton}"
    return said if doubtful(triton, capability[0]) else ""


def kernel_of() -> Kernel:
    """Its function, which runs on a GPU; imported when it is asked for."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    found: Kernel = chunk_gated_delta_rule
    return found


def by_fla(
    rule: str,
    tokens: Tokens,
    chunk: int,
    initial_HVK: Tensor,
    state_BHVK: Tensor | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """As linear_memory; it chooses chunks itself. Values, keys and queries in bfloat16, states in float32.

    Rows in which documents begin are linear_memory's: fla would have their lengths read by the host. Raises ValueError for a
    rule that is not its own.
    """
    if rule not in VALUES:
        raise ValueError(f"fla has no rule {rule}; it has {', '.join(VALUES)}")
    if tokens.starts is not None:
        return linear_memory(rule, tokens, chunk, initial_HVK, state_BHVK)
    state = initial_HVK.expand(tokens.k.shape[0], *initial_HVK.shape) if state_BHVK is None else state_BHVK
    log_keep, share = tokens.log_keep.clamp(min=LEAST), VALUES[rule]
    keep = log_keep.exp()
    beta, v = tokens.rate / (share * keep), (share * keep).unsqueeze(-1) * tokens.v
    narrow = torch.bfloat16 if tokens.k.is_cuda else tokens.k.dtype
    given: dict[str, Any] = {
        name: x.transpose(1, 2).to(narrow).contiguous() for name, x in (("q", tokens.q), ("k", tokens.k), ("v", v))
    }
    given |= {name: x.transpose(1, 2).contiguous() for name, x in (("g", log_keep), ("beta", beta))}
    start = state.mT.contiguous()
    o, last = (kernel or kernel_of())(**given, scale=1.0, initial_state=start, output_final_state=True)
    return o.transpose(1, 2).to(tokens.v.dtype), last.mT
