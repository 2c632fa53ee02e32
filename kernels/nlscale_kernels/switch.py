"""Operators with a kernel for GPUs, and a switch that takes their references instead, to find out which one is wrong."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.library import CustomOpDef

from nlscale_kernels import level_step, newton_schulz
from nlscale_kernels.linear_memory import op as linear_memory
from nlscale_kernels.mlp_memory import op as mlp_memory
from nlscale_kernels.mlp_memory import step as memory_step
from nlscale_kernels.self_modifying import op as self_modifying
from nlscale_kernels.self_modifying import resident

OPERATORS: dict[str, CustomOpDef] = {
    "level_step.adamw": level_step.adamw,
    "level_step.momenta": level_step.momenta,
    "level_step.descend": level_step.descend,
    "self_modifying.reach": self_modifying.reach,
    "self_modifying.backward": self_modifying.backward,
    "self_modifying.resident": resident.resident,
    "linear_memory.forward": linear_memory.forward,
    "linear_memory.backward": linear_memory.backward,
    **{
        f"mlp_memory.{name}": getattr(mlp_memory, name)
        for name in ("active", "returned", "second", "errors", "of_errors")
    },
    "mlp_memory.step": memory_step.forward,
    "mlp_memory.step_backward": memory_step.backward,
    "newton_schulz.symmetric_product": newton_schulz.symmetric_product,
}


def fused() -> bool:
    """Whether kernels are not switched off here."""
    return "cuda" not in OPERATORS["level_step.adamw"]._disabled_kernel


@contextmanager
def kernels(which: str = "fused") -> Iterator[None]:
    """Within it, GPUs run `fused` kernels or the `reference` of every operator."""
    with ExitStack() as stack:
        for operator in OPERATORS.values() if which == "reference" else ():
            stack.enter_context(operator.set_kernel_enabled("cuda", enabled=False))
        yield
