"""liger-kernel's operators, interpreted, in place of torch's: a model's loss and every gradient are the same."""

from typing import Any

import pytest
import torch
from nlscale_kernels import liger
from nlscale_kernels.rotary import rotary_table, rotate_both

from nlscale.config.errors import UserError
from nlscale.config.read import read
from nlscale.config.train import LIGER
from nlscale.model.layers import Norm
from nlscale.model.liger import adopt
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.tiny import micro_batches, tiny

rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")
LEARNT = 1e-5  # relative, float32


class Number(float):
    """A float as Triton compiles it; the interpreter gives kernels plain ones."""

    def to(self, _: Any) -> float:
        return float(self)


def interpreted() -> None:
    """The interpreter knows no libdevice either."""
    import triton.language as tl

    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    liger.ADDED = Number(0.0)


def both() -> tuple[float, dict[str, float], set[str]]:
    """The losses' difference, that of each gradient, relative, and the names of the functions that were taken."""
    interpreted()
    run = tiny("model.layers=2", "model.tied=true")
    world = join(run.parallel, run.cluster, 0)
    found, taken = [], set()
    for adopts in (False, True):
        model = parallelize(run, world)
        if adopts:
            adopt(model.chunks[0], LIGER)
            for module in model.chunks[0].modules():
                if isinstance(module, Norm):
                    module.eps = Number(module.eps or 0.0)
                taken |= {
                    value.__name__
                    for value in (*vars(module).values(), getattr(vars(module).get("cross_entropy"), "func", None))
                    if getattr(value, "__module__", "") == liger.__name__
                }
        loss = model.chunks[0](*micro_batches(run, 1, 0, 1)[0])
        parameters = dict(model.chunks[0].named_parameters())
        found.append((loss, dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))))
    (plain, wanted), (loss, gradients) = found
    errors = {name: float((gradients[name] - g).norm() / g.norm()) for name, g in wanted.items()}
    return float((loss - plain).abs() / plain), errors, taken


def test_a_model_by_liger_is_the_model_by_torch() -> None:
    loss, gradients, taken = ranks(1, both)[0]
    assert taken == {"rms_norm", "rotate_both", "swiglu", "cross_entropy"}
    assert loss <= LEARNT and len(gradients) > 10
    assert max(gradients.values()) <= LEARNT, gradients


def test_rotary_positions_of_grouped_queries() -> None:
    tables = rotary_table(6, 8, 1e4)
    fused = torch.randn(6, 3, 48, requires_grad=True)

    def parts() -> list[torch.Tensor]:
        return [part.unflatten(-1, (-1, 8)) for part in fused.split([32, 16], -1)]

    for mine, theirs in zip(liger.rotate_both(*parts(), *tables), rotate_both(*parts(), *tables), strict=True):
        torch.testing.assert_close(mine, theirs)
        beside, of = torch.zeros_like(mine, requires_grad=True), torch.randn_like(mine)
        both = [torch.autograd.grad(x + beside, [fused, beside], of, retain_graph=True) for x in (mine, theirs)]
        for first, second in zip(*both, strict=True):
            torch.testing.assert_close(first, second)


def test_what_it_cannot_do_is_named() -> None:
    with pytest.raises(UserError, match="has no second derivatives, which levels with unit: token"):
        read("demo", ["train.liger=[norm]", "use.levels=inside"])
    with pytest.raises(UserError, match="'rope'; choose of norm, rotary, swiglu, loss"):
        read("demo", ["train.liger=[rope]"])
    with pytest.raises(UserError, match="with train.kernels=reference would run torch"):
        read("demo", ["train.liger=[norm]", "train.kernels=reference"])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"needs an NVIDIA GPU; train.liger=\[\] would work"):
            ranks(1, lambda: parallelize(tiny("train.liger=[norm,loss]"), join(tiny().parallel, tiny().cluster, 0)))
