"""Imports are paid here once; ranks are forked from this process."""

from nlscale.runtime.quiet import quiet

quiet()
