"""What rows leave to the rows that go on where they ended: the memories of mixers, and what token levels have learned.

Every tensor of it is (rows, heads or feed-forward units of this rank, ...), so that any layout can take it apart.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from nlscale.model.attention import Context
from nlscale.model.fast import Whole


class RowState(NamedTuple):
    """Of one stage."""

    mixer: str  # of the model that left it: mixers of several kinds keep tensors of the same shapes
    mixers: list[Any]  # in the order in which blocks were passed; None: nothing is handed on
    copies: list[dict[str, dict[str, Any]]]  # adaptive block -> level -> part -> what it learned; [] where none adapts


def mapped(change: Callable[..., Any], name: str, first: Any, *others: Any) -> Any:
    """`change(name, tensor, ...)` on each tensor of values built alike; names and None stay as they are.

    Raises ValueError where the others are built otherwise.
    """
    for other in others:
        if (theirs := kind_of(other)) != (ours := kind_of(first)):
            raise ValueError(f"{name}: the state is another model's: {theirs} where this one has {ours}")
    if first is None or isinstance(first, str):
        return first
    if isinstance(first, Tensor):
        return change(name, first, *others)
    if isinstance(first, Whole):
        return Whole(mapped(change, name, first.change, *(other.change for other in others)))
    if isinstance(first, dict):
        return {key: mapped(change, f"{name}.{key}", each, *(o[key] for o in others)) for key, each in first.items()}
    parts = first._fields if hasattr(first, "_fields") else range(len(first))
    made = [mapped(change, f"{name}.{part}", *each) for part, *each in zip(parts, first, *others, strict=True)]
    return type(first)(*made) if hasattr(first, "_fields") else made


def kind_of(value: Any) -> str:
    """What two values must have in common to be parts of states of one model."""
    if isinstance(value, str):
        return value
    parts = ", ".join(value) if isinstance(value, dict) else len(value) if type(value) in (list, tuple) else None
    return type(value).__name__ + ("" if parts is None else f" of {parts}")


def check(given: Any, expected: Any, name: str) -> None:
    """Raises ValueError, with both shapes, where a state is not what this model hands on."""

    def same(place: str, ours: Tensor, theirs: Tensor) -> None:
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ValueError(
                f"{place}: a state of {tuple(theirs.shape)} {theirs.dtype} was given; "
                f"{tuple(ours.shape)} {ours.dtype} would work"
            )

    mapped(same, name, expected, given)


def between_rows(left: Any) -> Any:
    """What goes on when a row ends: memories do; keys and values of attention are of their row."""
    if isinstance(left, Context):
        return None
    return left._replace(context=None) if hasattr(left, "context") else left


def spread(state: Any, rows: int) -> Any:
    """A state with a row dimension of 1, for many rows (views)."""
    return mapped(lambda _, part: part.expand(rows, *part.shape[1:]), "", state)
