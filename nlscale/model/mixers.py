"""The table of mixers: `model.mixer` -> how a block mixes tokens. Their parameters' names are in config/shapes.py."""

from collections.abc import Callable

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from nlscale.config.model import Model
from nlscale.model.attention import Attention
from nlscale.model.exchange import Exchange
from nlscale.model.linear import LinearMixer
from nlscale.model.self_modifying import SelfModifyingMixer
from nlscale.model.titans import TitansGate, TitansLayer, TitansMixer
from nlscale.model.titans_context import TitansContext
from nlscale.model.written import WrittenMixer

MIXERS: dict[str, Callable[[Model, TransformerConfig, Exchange], MegatronModule]] = {
    "attention": Attention,
    "linear": LinearMixer,
    "delta": LinearMixer,
    "written": WrittenMixer,
    "titans": TitansMixer,
    "titans_mac": TitansContext,
    "titans_mag": TitansGate,
    "titans_mal": TitansLayer,
    "self_modifying": SelfModifyingMixer,
}
