"""Which configs of kernels are fast on which device: committed files, read once; nothing is tried out while training.

One JSON file a device and Triton version, NAME.triton36.json: kernel -> list of {"shape": {...}, "config": {"tiles": {...},
"warps": w, "stages": s}, "microseconds": t}. A shape that is not there takes the nearest one's; a device that is not there
takes the first config of the kernel's list, on every rank alike. `python -m nlscale_kernels.tune` writes them on a GPU.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from nlscale_kernels.arguments import check
from nlscale_kernels.triton_build import Config

FOLDER = Path(__file__).parent


def file_of(device: str, version: str = triton.__version__) -> str:
    """The file's name for a device as its driver calls it."""
    short = "".join(version.split(".")[:2])
    return f"{'_'.join(device.lower().split())}.triton{short}.json"


@cache
def entries(name: str, folder: Path = FOLDER) -> dict[str, list[dict[str, Any]]]:
    """What a file says; nothing where there is none."""
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def device_facts(index: int) -> tuple[str, int]:
    """A device's name and architecture."""
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), 10 * major + minor


def chosen(kernel: str, configs: Sequence[Config], device: torch.device, **shape: int) -> Config:
    """The config for a shape on a device."""
    name, arch = device_facts(device.index or 0)
    able = [each for each in configs if each.least <= arch]
    least = min(each.least for each in configs)
    check(bool(able), f"{kernel}: {name} is of sm_{arch}, too small for its configs; it needs sm_{least}")
    return nearest(entries(file_of(name)).get(kernel, []), able, shape)


def nearest(known: Sequence[Mapping[str, Any]], configs: Sequence[Config], shape: Mapping[str, int]) -> Config:
    """The config of the nearest shape that is known, as ratios go; else the first."""
    found = [
        (sum(abs(math.log(size / each["shape"][name])) for name, size in shape.items()), place)
        for place, each in enumerate(known)
        if each["shape"].keys() == shape.keys()
    ]
    if not found:
        return configs[0]
    best = known[min(found)[1]]["config"]
    return Config(best["tiles"], best["warps"], best["stages"])
