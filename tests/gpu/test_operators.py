"""Every operator on one GPU: captured in a graph, forward and back, and compiled whole, it gives what it gives by itself."""

from collections.abc import Callable

import pytest
import torch
from nlscale_kernels.switch import OPERATORS
from nlscale_kernels.tuned import device_facts
from torch import Tensor

from tests.operators import LEARNING, arguments, done, learnt, tensors, widened

pytestmark = pytest.mark.gpu
NARROW = {"newton_schulz.symmetric_product": torch.bfloat16}  # its kernel takes no wider ones
RELATIVE = 1e-2


def given_for(name: str) -> tuple:
    """Its arguments on the GPU; skips where that has no room for the kernel."""
    if name == "self_modifying.resident" and device_facts(torch.cuda.current_device())[1] < 90:
        pytest.skip("needs the shared memory of sm_90")
    return arguments(name, "cuda", NARROW.get(name, torch.float32))


def captured(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a graph of the call gives when it is played; warmed up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for x in found:
        x.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("form", [done, learnt], ids=["forward", "back"])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_it_is_its_reference_in_float64(name: str, form: Callable[..., list[Tensor]]) -> None:
    """By relative norms: float32 is multiplied as tf32."""
    if form is learnt and name not in LEARNING:
        pytest.skip("no way back of its own")
    given = given_for(name)
    wide = widened(given)
    for x, y in zip(form(name, given, tensors(given)), form(name, wide, tensors(wide)), strict=True):
        assert float((x.cpu().double() - y.double()).norm()) <= RELATIVE * float(y.double().norm())


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_it_is_captured(name: str) -> None:
    given = given_for(name)
    plain = done(name, given, tensors(given))
    for x, y in zip(captured(lambda: done(name, given, tensors(given))), plain, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", LEARNING)
def test_its_way_back_is_captured(name: str) -> None:
    given = given_for(name)
    plain = learnt(name, given, tensors(given))
    for x, y in zip(captured(lambda: learnt(name, given, tensors(given))), plain, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_it_is_compiled_whole(name: str) -> None:
    given = given_for(name)
    those = tensors(given)
    torch.compiler.reset()  # the same lines are compiled for every operator
    compiled = torch.compile(lambda *x: done(name, given, x), fullgraph=True)
    for x, y in zip(compiled(*those), done(name, given, those), strict=True):
        torch.testing.assert_close(x, y)
