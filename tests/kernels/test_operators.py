"""Every operator that has a kernel, called as itself: in one graph of torch.compile, well formed, and learnt through."""

import pytest
import torch
from nlscale_kernels.switch import OPERATORS
from torch import Tensor

from tests.operators import LEARNING, TOLD, arguments, done, filled, learnt, tensors, widened

DOUBLE = torch.float64


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_it_is_compiled_whole(name: str) -> None:
    given = arguments(name, "cpu", DOUBLE)
    those = tensors(given)
    torch.compiler.reset()  # the same lines are compiled for every operator
    compiled = torch.compile(lambda *x: done(name, given, x), fullgraph=True, backend="aot_eager")
    mine, theirs = compiled(*those), done(name, given, those)
    assert len(mine) == len(theirs) > len(those) - (name == "level_step.momenta")
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_it_is_well_formed(name: str) -> None:
    """Its schema says what it writes to, and nothing it gives is what it was given; its shapes are known before it runs."""
    given = arguments(name, "cpu", DOUBLE)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    said = torch.library.opcheck(OPERATORS[name], tuple(filled(given, tensors(given))), test_utils=checks)
    assert said == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize("name", LEARNING)
def test_it_is_learnt_through_when_compiled(name: str) -> None:
    given = arguments(name, "cpu", DOUBLE)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors(given)]
    torch.compiler.reset()

    def total(*those: Tensor) -> Tensor:
        said = OPERATORS[name](*filled(given, those))
        outs = [said] if isinstance(said, Tensor) else said
        ends = [torch.linspace(-1, 1, x.numel(), dtype=DOUBLE).view(x.shape) for x in outs]
        return sum(((x * end).sum() for x, end in zip(outs, ends, strict=True)), torch.zeros((), dtype=DOUBLE))

    wanted = [x for x in leaves if x.requires_grad]
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    mine = [x for x in torch.autograd.grad(compiled(*leaves), wanted, allow_unused=True) if x is not None]
    theirs = learnt(name, given, leaves)[-len(mine) :]
    assert len(mine) >= 3 and sum(bool(x.any()) for x in mine) >= 3
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


# Of several tensors; what a way back is given, forward has seen.
CHECKED = [name for name in sorted(OPERATORS) if name != "mlp_memory.active" and not name.endswith("backward")]


@pytest.mark.parametrize("name", CHECKED)
def test_a_tensor_on_another_device_is_named(name: str) -> None:
    """Every tensor in turn, as an operator sees them behind the dispatcher."""
    given = arguments(name, "cpu", torch.float32)
    for place in (place for place, each in enumerate(given) if isinstance(each, Tensor)):
        with pytest.raises(ValueError, match=r": \w+ (is|are) .*on (meta|cpu).* (meta|cpu)"):
            OPERATORS[name]._init_fn(*given[:place], given[place].to("meta"), *given[place + 1 :])


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_its_form_for_gpus_is_its_reference_in_float64(name: str) -> None:
    """Interpreted: all that it gives, and all that it leaves of what it was given."""
    narrow = torch.float16 if name.startswith("newton") else torch.float32
    given = arguments(name, "cpu", narrow)
    wide = widened(given)
    mine = filled(given, [x.clone() for x in tensors(given)])
    said = OPERATORS[name]._backend_fns["cuda"](*mine)
    found = [*([said] if isinstance(said, Tensor) else (said or ())[: TOLD.get(name)]), *tensors(mine)]
    for x, y in zip(found, done(name, wide, tensors(wide)), strict=True):
        least = 3e-7 if x.dtype == torch.float32 else 4e-3  # the interpreter cuts half precision off
        assert float((x.double() - y.double()).norm()) <= least * float(y.double().norm())


class Entered(Exception):
    """The GPU of a tensor was asked for."""


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_it_runs_on_the_gpu_of_its_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the current one: the first thing that its form for GPUs does is to go there."""
    given = filled(arguments(name, "cpu", DOUBLE), tensors(arguments(name, "cpu", DOUBLE)))

    def entered(tensor: Tensor) -> None:
        raise Entered(tensor.data_ptr())

    monkeypatch.setattr(torch.cuda, "device_of", entered)
    with pytest.raises(Entered) as seen:
        OPERATORS[name]._backend_fns["cuda"](*given)
    assert seen.value.args == (next(x for x in given if isinstance(x, Tensor)).data_ptr(),)


@pytest.mark.parametrize("name", ["linear_memory.forward", "newton_schulz.symmetric_product", "self_modifying.reach"])
def test_more_programs_than_a_gpu_takes_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlscale_kernels.arguments.PROGRAMS", 1)
    narrow = torch.bfloat16 if name.startswith("newton") else torch.float32
    given = arguments(name, "cpu", narrow)
    with pytest.raises(ValueError, match="and a GPU takes 1 a call; fewer at a time would do"):
        OPERATORS[name]._backend_fns["cuda"](*filled(given, tensors(given)))
