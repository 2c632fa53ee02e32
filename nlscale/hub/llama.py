"""The Llama family's names for what a run holds: its tensors, and the shape of its network.

A feed-forward block of a Llama and levels side by side compute the same (spec 2.5, V13): gate and up of the levels lie one
after another among its rows, down among its columns. So a Llama becomes a continuum by cutting, and an independent
continuum a Llama by joining, and each computes what the other did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nlscale.config.errors import require
from nlscale.config.levels import Level, Levels
from nlscale.config.model import Model
from nlscale.config.run import Run

MODELS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}  # which differ in the window of attention alone
SHAPE = {  # their name -> ours
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "vocab_size": "vocabulary",
}
MIXER = {"norm": "input_layernorm", "out": "self_attn.o_proj", **{x: f"self_attn.{x}_proj" for x in "qkv"}}
SCALING = ("factor", "low_freq_factor", "high_freq_factor")
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Joined:
    """Our leaves that make one of their tensors: one after another along the first axis, then transposed or not."""

    shape: tuple[int, ...]  # of theirs
    leaves: Sequence[str]
    units: Sequence[int] = ()  # rows of each leaf; of a single one, all
    transposed: bool = False
    gains: str | None = None  # a leaf whose numbers weigh the leaves, one each

    def cut(self, theirs: Tensor) -> dict[str, Tensor]:
        """The leaves of their tensor: views."""
        whole = theirs.t() if self.transposed else theirs
        parts = whole.split(list(self.units)) if self.units else [whole]
        return dict(zip(self.leaves, parts, strict=True))

    def joined(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor, of the leaves and their gains."""
        parts = [ours[name] for name in self.leaves]
        if self.gains is not None:
            parts = [part * weight for part, weight in zip(parts, ours[self.gains], strict=True)]
        whole = torch.cat(parts)
        return whole.t() if self.transposed else whole


def tensors(model: Model, levels: list[Level]) -> dict[str, Joined]:
    """Each of their tensors, by its name, and the leaves that it is."""
    units = {name: count for name, count in Levels(levels=levels).units(model.feed_forward).items() if count}
    width, hidden = model.width, model.feed_forward
    keys = model.key_value_heads * model.head_width
    shapes = {"norm": (width,), "q": (width, width), "k": (keys, width), "v": (keys, width), "out": (width, width)}
    known = (model.vocabulary or 0, width)
    found = {"model.embed_tokens.weight": Joined(known, ["embed.weight"])}
    for j in range(model.layers):
        ours, theirs = f"blocks.{j}", f"model.layers.{j}"
        for own, name in MIXER.items():
            found[f"{theirs}.{name}.weight"] = Joined(shapes[own], [f"{ours}.mix.{own}.weight"])
        found[f"{theirs}.post_attention_layernorm.weight"] = Joined((width,), [f"{ours}.continuum.norm.weight"])
        for part in ("gate", "up", "down"):
            leaves, outward = [f"{ours}.continuum.{name}.{part}.weight" for name in units], part == "down"
            shape = (width, hidden) if outward else (hidden, width)
            gains = f"{ours}.continuum.gains" if outward and model.gains else None
            found[f"{theirs}.mlp.{part}_proj.weight"] = Joined(shape, leaves, list(units.values()), outward, gains)
    found["model.norm.weight"] = Joined((width,), ["norm.weight"])
    if not model.tied:
        found["lm_head.weight"] = Joined(known, ["head.weight"])
    return found


def shape_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The network of a `config.json`, as `model` keys; raises UserError for what none of ours computes."""
    kind = config.get("model_type")
    require(kind in MODELS, f"{where}: model_type {kind} is none of {', '.join(MODELS)}")
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        require(not config.get(name), f"{where}: {name} is {config.get(name)}, which this network has not")
    require(
        config.get("hidden_act", "silu") in ("silu", "swish"),
        f"{where}: hidden_act {config.get('hidden_act')} must be silu",
    )
    for name in (*SHAPE, "rms_norm_eps"):
        require(isinstance(config.get(name), int | float), f"{where} says no {name}")
    found: dict[str, Any] = {ours: config[theirs] for theirs, ours in SHAPE.items()}
    head = config.get("head_dim") or found["width"] // found["heads"]
    require(
        head * found["heads"] == found["width"],
        f"{where}: head_dim {head} must be hidden_size / num_attention_heads = {found['width'] / found['heads']:g}",
    )
    found |= {
        "kv_heads": config.get("num_key_value_heads") or found["heads"],
        "tied": bool(config.get("tie_word_embeddings", False)),
        "window": config.get("sliding_window") if kind == "mistral" else None,
        "norm_eps": config["rms_norm_eps"],
    }
    return found | positions(config, where)


def positions(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary positions of a `config.json`, in its older form or its newer one (`rope_parameters`)."""
    told: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        said = config.get(name) or {}
        require(isinstance(said, dict), f"{where}: {name} must be a mapping")
        told |= said
    base = told.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = told.get("rope_type", told.get("type", "default"))
    require(kind in ("default", "linear", "llama3"), f"{where}: rope_type {kind} is none of default, linear, llama3")
    if kind == "default":
        return {"rope_base": base}
    wanted = ("factor",) if kind == "linear" else (*SCALING, ORIGINAL)
    for name in wanted:
        require(name in told, f"{where}: rope_type {kind} says no {name}")
    scaling = {name.replace(ORIGINAL, "original"): told[name] for name in wanted}
    return {"rope_base": base, "rope_scaling": {"type": kind, **scaling}}


def strange(model: Model) -> str:
    """What of a network no Llama computes; empty where it is one, as long as nothing learns inside rows."""
    for said, what in (
        (model.mixer != "attention", f"model.mixer={model.mixer}"),
        (model.variant != "independent", f"model.variant={model.variant}"),
        (model.activation != "swiglu", f"model.activation={model.activation}"),
        (model.loops > 1, f"model.loops={model.loops}"),
    ):
        if said:
            return what
    return ""


def described(run: Run, document: int) -> dict[str, Any]:
    """The `config.json` of a run's network, but for its dtype; `document`: the token that begins and ends a text."""
    model, scaling = run.model, run.model.rope_scaling
    kind = "mistral" if model.window else "llama"
    rope: dict[str, Any] | None = None
    if scaling.type != "none":
        rope = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        rope = {"rope_type": "llama3", **{name: getattr(scaling, name) for name in SCALING}, ORIGINAL: scaling.original}
    shape = {theirs: getattr(model, ours) for theirs, ours in SHAPE.items()}
    return {
        "architectures": [MODELS[kind]],
        "model_type": kind,
        **shape,
        "intermediate_size": model.feed_forward,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_scaling": rope,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": run.data.sequence,
        "initializer_range": model.init_std,
        "bos_token_id": document,
        "eos_token_id": document,
        **({"sliding_window": model.window} if model.window else {"attention_bias": False, "mlp_bias": False}),
    }
