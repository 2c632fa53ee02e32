"""Arguments of every operator that has a kernel, small: what is compiled, checked and, on a GPU, captured."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from nlscale_kernels import level_step, tune
from nlscale_kernels.level_step import AdamW, Descend, Momenta
from nlscale_kernels.self_modifying import op as solve
from nlscale_kernels.switch import OPERATORS
from torch import Tensor

B, H, N, C, K, M = 2, 3, 2, 24, 32, 48
FLAT = 3000  # elements of level_step's memory
TOLD = {"self_modifying.resident": 5}  # results; what comes after them its kernels keep for the way back
LEARNING = (  # with a way back of their own; what lies between a memory's products is parts of one (mlp_memory/lean.py)
    "linear_memory.forward",
    "mlp_memory.step",
    "newton_schulz.symmetric_product",
    "self_modifying.reach",
    "self_modifying.resident",
)


class Maker:
    """Random numbers in one dtype on one device."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.generator = device, dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def like(self, given: Sequence[Any]) -> tuple[Any, ...]:
        """The same in this dtype."""
        return tuple(x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)


def arguments(name: str, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Of an operator of `OPERATORS`."""
    make, (room, _, what) = Maker(device, dtype), name.partition(".")
    if room == "level_step":
        return of_levels(what, make)
    if room == "mlp_memory" and what in ("step", "step_backward"):
        return of_step(make) + ((make(B, H, N, M, K), make(B, H, N, M, K)) if what == "step_backward" else ())
    if room == "mlp_memory":
        return of_memory(what, make)
    if room == "newton_schulz":
        square = make(N, C, C)
        return (square, square, make(N, C, C), 0.5, 2.0)
    if room == "linear_memory":
        given = make.like(tune.tokens_of(B, H, 2 * C, C, K, device, torch.float32))
        return given + ((make(B, H, 2 * C, K), make(B, H, K, K)) if what == "backward" else ())
    if what == "resident":
        return make.like(tune.walk_of(B, H, N, C, K, device))
    return of_solve(what, make)


def of_levels(what: str, make: Maker) -> tuple[Any, ...]:
    """Flat memory, one block of which rests."""
    master, other, first, second = (make(FLAT) for _ in range(4))
    blocks = (torch.arange(-(-FLAT // level_step.BLOCK)) % 2).int().to(make.device)

    def table(*rows: Any) -> Tensor:
        return level_step.table(rows, master)

    if what == "adamw":
        rows = table(AdamW.at(3, 0.02, (0.9, 0.95), 1e-8, 0.1, 0.25), AdamW.rest())
        return (master, other, first, second.abs(), master.bfloat16(), rows, blocks)
    if what == "momenta":
        rows = table(Momenta(1.0, 0.25, 0.9, 0.1, 1.0, 0.95, 0.05), Momenta(*[0.0] * 7))
        return (other, master, first, second, rows, blocks)
    return (master, other, master.bfloat16(), table(Descend(1.0, 0.02, 0.1), Descend(*[0.0] * 3)), blocks)


def of_memory(what: str, make: Maker) -> tuple[Any, ...]:
    """Between the products of a SwiGLU memory."""
    before, inward, back = make(B, H, N, C, 2 * M), make(B, H, N, C, M), make(B, H, N, C, 2 * M)
    heard, weights = make(B, H, N, C, K), make(B, H, C, 2)
    return {
        "active": (before, "swiglu"),
        "returned": (before, inward, back, "swiglu"),
        "second": (before, inward, back, "swiglu"),
        "errors": (heard, make(B, H, 1, C, K), make(B, H, C, K), weights),
        "of_errors": (make(B, H, N, C, 2 * K), heard, weights, make(B, H, N, C, K)),
    }[what]


def of_step(make: Maker) -> tuple[Any, ...]:
    """With momentum and a limit that binds."""
    weights, factors = [make(B, H, N, M, K) for _ in range(4)], [make(B, H).sigmoid() for _ in range(3)]
    return (*weights, *factors, -1.0, 10.0)


def of_solve(what: str, make: Maker) -> tuple[Any, ...]:
    """One chunk of two documents."""
    k, kept = F.normalize(make(B, H, C, K), dim=-1), -0.1 * make(B, H, C).sigmoid()
    total, document = kept.cumsum(-1), (torch.arange(C, device=make.device) > C // 3).int().expand(B, C).contiguous()
    scalars = (make(B, H, C).sigmoid(), total - kept, total, make(B, H, C).sigmoid())
    given = solve.Given(k, *scalars, document)
    return tuple(given) + ((solve.reached(given), make(B, H, C, K)) if what == "backward" else ())


def tensors(given: Sequence[Any]) -> list[Tensor]:
    """Those among arguments."""
    return [x for x in given if isinstance(x, Tensor)]


def filled(given: Sequence[Any], with_: Sequence[Tensor]) -> list[Any]:
    """The arguments with other tensors in their places."""
    left = iter(with_)
    return [next(left) if isinstance(x, Tensor) else x for x in given]


def widened(given: Sequence[Any]) -> list[Any]:
    """The arguments on the CPU, in float64 but for what stays in half precision beside float32."""
    narrow = next(x.dtype for x in given if isinstance(x, Tensor))
    moved = [x.cpu() if isinstance(x, Tensor) else x for x in given]
    return [x.double() if isinstance(x, Tensor) and x.dtype == narrow else x for x in moved]


def done(name: str, given: Sequence[Any], those: Sequence[Tensor]) -> list[Tensor]:
    """What an operator gives, then all its tensors as it left them; `those` are not written to."""
    mine = [x.clone() for x in those]
    said = OPERATORS[name](*filled(given, mine))
    return [*([said] if isinstance(said, Tensor) else (said or ())[: TOLD.get(name)]), *mine]


def learnt(name: str, given: Sequence[Any], those: Sequence[Tensor]) -> list[Tensor]:
    """What an operator gives, and the gradients of the tensors that it learns through."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in those]
    said = OPERATORS[name](*filled(given, leaves))
    outs = [x for x in ([said] if isinstance(said, Tensor) else said) if x.requires_grad and x.numel()]
    ends = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in outs]
    found = torch.autograd.grad(outs, [x for x in leaves if x.requires_grad], ends, allow_unused=True)
    return [*(x.detach() for x in outs), *(x for x in found if x is not None)]
