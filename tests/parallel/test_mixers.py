"""Every mixer on every layout, context parallelism included: loss and gradients equal those of one process."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nlscale.config.run import Run
from nlscale.parallel.apply import parallelize
from nlscale.runtime.world import join
from nlscale.testing import ranks
from tests.parallel.test_equal import gradients
from tests.sampled import sampled
from tests.tiny import micro_batches, tiny
from tests.whole import assemble

SMALL = [
    "model.linear.chunk=4",
    "model.written.chunk=4",
    "model.titans.chunk=4",
    "model.self_modifying.chunk=4",
    "model.self_modifying.maker_chunk=8",
    "model.self_modifying.gate=true",
    "model.layers=2",
]
MIXERS = {
    "attention": ["model.kv_heads=4"],
    "attention-window": ["model.kv_heads=4", "model.window=6"],
    "linear": ["model.mixer=linear"],
    "delta": ["model.mixer=delta"],
    "written": ["model.mixer=written", "model.window=6"],
    "titans": ["model.mixer=titans"],
    "titans_mac": ["model.mixer=titans_mac"],
    "titans_mag": ["model.mixer=titans_mag", "model.window=6"],
    "titans_mal": ["model.mixer=titans_mal", "model.window=6"],
    "self_modifying": ["model.mixer=self_modifying"],
    "self_modifying-query": ["model.mixer=self_modifying", "model.self_modifying.query=true"],
    "self_modifying-causal": ["model.mixer=self_modifying", "model.attention=causal"],
}
LAYOUTS = {
    "tensor": (2, ["parallel.tensor=2"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "context": (2, ["parallel.context=2"]),
    "data": (2, []),
    "tensor-sequence-context": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"]),
    "pipeline-context": (4, ["parallel.pipeline=2", "parallel.context=2"]),
    "context4": (4, ["parallel.context=4"]),
}
CASES = [
    (mixer, layout)
    for mixer in MIXERS
    for layout in LAYOUTS
    if "-" not in layout or mixer in ("attention", "delta", "self_modifying")
]
LEFT = [(mixer, layout) for mixer in MIXERS for layout in ("data", "pipeline")]  # test_equal.py has both, for attention
LEFT += [
    (mixer, "context4") for mixer in ("written", "titans", "titans_mag", "titans_mal", "attention-window", "linear")
]
LEFT += [(mixer, "tensor-sequence-context") for mixer in ("attention", "delta")]
LEFT = [
    case
    for case in LEFT
    if case not in [(m, "pipeline") for m in ("self_modifying", "titans_mac", "titans_mal", "delta")]
]


@pytest.fixture(scope="module")
def one() -> dict:
    return {mixer: ranks(1, gradients, tiny(*SMALL, *said), torch.float64)[0] for mixer, said in MIXERS.items()}


@pytest.mark.parametrize("mixer", MIXERS)
def test_half_precision_is_near(one: dict, mixer: str) -> None:
    loss, expected = one[mixer][0], assemble([one[mixer][1]])
    half, pieces = ranks(1, gradients, tiny(*SMALL, *MIXERS[mixer]), torch.bfloat16)[0]
    assert half == pytest.approx(loss, rel=2e-2)
    actual = assemble([pieces])
    whole, apart = (torch.cat([each[name].double().flatten() for name in expected]) for each in (expected, actual))
    # weights and gradients are rounded to 8 bits; MAC norms what attention gives, which at the start is close to nothing
    assert (whole - apart).norm() < (0.15 if mixer == "titans_mac" else 0.05) * whole.norm()


@pytest.mark.parametrize(("mixer", "layout"), sampled(CASES, LEFT))
def test_layout_equals_one_process(one: dict, mixer: str, layout: str) -> None:
    count, overrides = LAYOUTS[layout]
    results = ranks(count, gradients, tiny(*SMALL, *MIXERS[mixer], *overrides), torch.float64)
    loss, expected = one[mixer][0], assemble([one[mixer][1]])
    assert all(abs(result[0] - loss) < 1e-11 * loss for result in results)
    actual = assemble([result[1] for result in results])
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert (actual[name] - grad).norm() <= 1e-11 * grad.norm(), name


class Collectives(TorchDispatchMode):
    """Counts what goes through a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function._schema.name] += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))


def collectives(run: Run) -> Counter[str]:
    """Of the forward and backward pass of a micro-batch."""
    world = join(run.parallel, run.cluster, 0)
    model = parallelize(run, world, torch.float64)
    with Collectives() as counted:
        model.forward_backward(micro_batches(run, 0, 0, 1)[:1], True)
    return +counted.seen


WRITES = {
    "titans": ("model.titans.chunk=2", "model.titans.chunk=16"),
    "titans_mac": ("model.titans.chunk=2", "model.titans.chunk=16"),
    "self_modifying": ("model.self_modifying.maker_chunk=4", "model.self_modifying.maker_chunk=16"),
    "delta": ("model.linear.chunk=2", "model.linear.chunk=8"),
    "written": ("model.written.chunk=2", "model.written.chunk=8"),
}


@pytest.mark.parametrize("layout", ["tensor", "context"])
@pytest.mark.parametrize("mixer", WRITES)
def test_a_memory_writes_without_a_collective(mixer: str, layout: str) -> None:
    """Several more writes a row, and not one more collective; under tensor parallelism as many as attention has."""
    said = [*SMALL, *MIXERS[mixer], *LAYOUTS[layout][1]]
    often, seldom = (ranks(2, collectives, tiny(*said, chunk))[0] for chunk in WRITES[mixer])
    assert often == seldom and often.total() > 0
    if layout == "tensor":
        attention = ranks(2, collectives, tiny(*SMALL, *MIXERS["attention"], *LAYOUTS[layout][1]))[0]
        assert often == attention
