"""Hugging Face transformers, for tests that hold ours against theirs: offline, and with a cache that goes with the tests."""

import atexit
import os
import shutil
import sys
import tempfile

import nlscale.data.mds  # noqa: F401  # stands in for what is brought in here

cache, mine = tempfile.mkdtemp(prefix="nlscale-hub-"), os.getpid()
atexit.register(lambda: shutil.rmtree(cache, ignore_errors=True) if os.getpid() == mine else None)
os.environ.update(HF_HOME=cache, HF_HUB_OFFLINE="1")
sys.modules["torchvision"] = None  # type: ignore[assignment]  # its wheels, built for CUDA, die beside a CPU torch

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

del sys.modules["torchvision"]

__all__ = [
    "ROPE_INIT_FUNCTIONS",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "LlamaConfig",
    "LlamaForCausalLM",
    "MistralConfig",
    "MistralForCausalLM",
]
