"""Libraries announce themselves at import; a user's screen is not the place."""

import logging
import os
import warnings
from pathlib import Path


def quiet() -> None:
    """Call before torch, megatron-core, DeepSpeed and streaming are imported. NLSCALE_VERBOSE=1 keeps their voices."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not forbid a fork
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core's overlap needs its streams in order
    if os.environ.get("NLSCALE_VERBOSE") == "1":
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one and warns that it found none
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in ("DeepSpeed", "megatron", "streaming", "torch.distributed", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
