"""Times every config of the kernels that have several, on this machine's GPU, and writes tuned/DEVICE.tritonXY.json.

    python -m nlscale_kernels.tune

Every config is first held against float64; one that is wrong is named and left out.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nlscale_kernels.newton_schulz import reference
from nlscale_kernels.newton_schulz import triton as products
from nlscale_kernels.triton_build import Config
from nlscale_kernels.tuned import FOLDER, device_facts, file_of

SIDES = (256, 512, 1024, 2048, 4096, 8192)
TOLERANCE = 1e-2  # relative norm, bfloat16


def best(
    configs: Sequence[Config],
    run: Callable[[Config], Tensor],
    expected: Tensor,
    time: Callable[[Callable[[], Any]], float],
) -> dict[str, Any] | None:
    """The fastest config that is right, and its microseconds; None where none is."""
    found = []
    for place, config in enumerate(configs):
        try:
            error = float((run(config).double() - expected).norm() / expected.norm())
        except triton.OutOfResources as refused:
            print(f"  {refused}: {config}", file=sys.stderr)
            continue
        if not error <= TOLERANCE:
            print(f"  wrong by {error:.1e}: {config}", file=sys.stderr)
            continue
        found.append((time(lambda config=config: run(config)), place))  # type: ignore[misc]
    if not found:
        return None
    milliseconds, place = min(found)
    config = configs[place]
    chosen = {"tiles": dict(config.tiles), "warps": config.warps, "stages": config.stages}
    return {"config": chosen, "microseconds": round(1000 * milliseconds, 1)}


def symmetric_products(
    device: str, sides: Sequence[int], arch: int, time: Callable[..., float]
) -> list[dict[str, Any]]:
    """Of square matrices."""
    fitting, found = [each for each in products.CONFIGS if each.least <= arch], []
    for side in sides:
        x = torch.randn(1, side, side, device=device, dtype=torch.bfloat16) / side**0.5
        expected = reference.symmetric_product(x.double(), x.double())

        def run(config: Config, x: Tensor = x) -> Tensor:
            return products.symmetric_product(x, x, config=config)

        chosen = best(fitting, run, expected, time)
        if chosen is not None:
            found.append({"shape": {"rows": side}, **chosen})
            print(f"symmetric_product, {side} rows: {chosen}")
    return found


def main() -> int:
    """Writes the file; 2 where there is no GPU."""
    if not torch.cuda.is_available():
        print("there is no NVIDIA GPU here, so nothing can be timed", file=sys.stderr)
        return 2
    name, arch = device_facts(torch.cuda.current_device())
    found = {"symmetric_product": symmetric_products("cuda", SIDES, arch, triton.testing.do_bench)}
    path = FOLDER / file_of(name)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
