"""mosaicml-streaming imports torchvision, whose wheels are built for CUDA; beside a CPU torch that import dies."""

from importlib import metadata

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_operators() -> torch.library.Library | None:
    """Declares the two operators that torchvision's Python side expects its library to bring, where it cannot load.

    The result must be kept alive for as long as torchvision is used. None where torchvision's own library loads.
    """
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return None
    if torch.version.cuda is not None or version.endswith("+cpu") or hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + SCHEMA)
    return library
