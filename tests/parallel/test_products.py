"""How a GPU multiplies what stays in float32."""

import pytest
import torch

from nlscale.parallel.apply import multiply


@pytest.mark.parametrize(
    ("dtype", "device", "said"),
    [
        (torch.bfloat16, "cuda", ["high"]),
        (torch.float32, "cuda", ["highest"]),
        (torch.float64, "cuda", ["highest"]),
        (torch.bfloat16, "cpu", []),
    ],
)
def test_float32_beside_half_precision_is_multiplied_in_tf32(
    dtype: torch.dtype, device: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU alone: a run in float32 is one, whatever was before it, and a CPU has no TF32."""
    heard: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", heard.append)
    multiply(dtype, torch.device(device))
    assert heard == said
