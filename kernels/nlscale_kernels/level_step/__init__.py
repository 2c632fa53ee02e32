"""One move of many levels over flat memory: AdamW, the momenta of Muon and M3, and the step along a direction."""

from nlscale_kernels.level_step.op import adamw, descend, momenta
from nlscale_kernels.level_step.table import BLOCK, AdamW, Descend, Momenta, table

__all__ = ["BLOCK", "AdamW", "Descend", "Momenta", "adamw", "descend", "momenta", "table"]
