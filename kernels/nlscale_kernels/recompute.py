"""A part of an operator that backward computes again from its arguments, rather than keep what it needs."""

from collections.abc import Callable
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), whose intermediate tensors are computed again in backward; it draws no random numbers.

    Tensors inside of arguments (tuples, lists, dictionaries) are handed to torch one by one. It would hold a structure as it
    is, out of autograd's sight, and an enclosing recomputation could not let go of it.
    """
    tensors, form = tree_flatten(arguments)

    def call(*flat: Any) -> Any:
        return function(*tree_unflatten(list(flat), form))

    return checkpoint(call, *tensors, use_reentrant=False, preserve_rng_state=False)
