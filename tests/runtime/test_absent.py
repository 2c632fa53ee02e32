"""What our libraries import for nobody here is stood in for while they are imported, and no longer."""

import subprocess
import sys

import pytest
import torch

from nlscale.runtime.absent import absent, uncompiled


def test_meanwhile_every_name_below_a_package_is_an_empty_class(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_package.py").write_text("weight = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    with absent("heavy_package", "json"):
        import json  # loaded before, so itself

        from heavy_package.deep.inside import Thing  # type: ignore[import-not-found]

        assert isinstance(Thing(), Thing) and json.dumps([1]) == "[1]"
        assert not hasattr(sys.modules["heavy_package"], "__version__")
    assert not any(name.startswith("heavy_package") for name in sys.modules)
    import heavy_package  # type: ignore[import-not-found]

    assert heavy_package.weight == 7
    del sys.modules["heavy_package"]


def test_meanwhile_torch_compiles_nothing() -> None:
    compiling = torch.compile
    with uncompiled():

        @torch.compile(dynamic=True)
        def twice(x: int) -> int:
            return 2 * x

        assert torch.compile(twice) is twice and twice(3) == 6
    assert torch.compile is compiling


UNUSED = {"transformers", "torchvision", "wandb", "torch._inductor.compile_fx"}


STARTS = {
    "nlscale.train.loop": {"torch._dynamo"},
    "nlscale.train.loop, nlscale.optim.zero": set(),  # DeepSpeed's torch optimizers take dynamo
    "nlscale.hub.generate": {"torch._dynamo", "deepspeed", "streaming"},
}


@pytest.mark.parametrize("start", STARTS)
def test_a_start_loads_nothing_that_nobody_uses(start: str) -> None:
    """What ranks of a verb import before they have read anything."""
    code = f"import sys, {start}; print(sorted({UNUSED | STARTS[start]} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
