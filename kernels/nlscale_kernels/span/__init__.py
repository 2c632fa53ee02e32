"""Decay inside a chunk of tokens, with documents that begin in it."""

from nlscale_kernels.span.reference import Filter, Span, anchored, between, filtered, span_of

__all__ = ["Filter", "Span", "anchored", "between", "filtered", "span_of"]
