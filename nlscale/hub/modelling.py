"""A network of ours inside Hugging Face transformers, for folders that `nlscale export` wrote: to read and generate with.

What a row's memories hold comes out as `state`, and goes in with the row's next tokens (model/reader.py); so a token costs
what it costs in `nlscale generate`. To train, `nlscale train` is there.
"""

import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from torch.distributed import is_initialized
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from nlscale.config.cluster import Cluster
from nlscale.config.parallel import Parallel
from nlscale.config.read import of_plain
from nlscale.hub.imported import located
from nlscale.model.reader import Reader, reader
from nlscale.parallel.apply import PRECISIONS, Parallelized, parallelize
from nlscale.runtime.world import World, join

HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")  # what a download is told
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class NlscaleConfig(PretrainedConfig):
    """`run`: what a run's config says of its network; `pace`: factor on the rate of levels that move inside rows."""

    model_type = "nlscale"

    def __init__(self, run: dict[str, Any] | None = None, pace: float = 1.0, **others: Any) -> None:
        self.run, self.pace = run or {}, pace
        super().__init__(**others)


@dataclass
class Reading(ModelOutput):
    """What the network says of tokens (B, T): scores (B, T, V) of what comes next, and the state that reads on."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: Reader | None = None


class NlscaleForCausalLM(PreTrainedModel, GenerationMixin):
    """The network; rows come without padding."""

    config_class = NlscaleConfig
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, config: NlscaleConfig, dtype: torch.dtype | None = None) -> None:
        """`dtype`: of weights and sums; None: the run's own. Raises UserError for a config that is no run's."""
        super().__init__(config)
        run = of_plain(longer(config))
        built: Parallelized = parallelize(run, alone(), dtype or PRECISIONS[run.train.precision])
        built.pace(config.pace)
        (self.network,), self.piece, self.leaves = built.chunks, config.run["data"]["sequence"], built.leaves

    @classmethod
    def from_pretrained(
        cls, path: str, *_: Any, config: NlscaleConfig | None = None, **given: Any
    ) -> "NlscaleForCausalLM":
        """The network of an exported folder, or of a repository on the hub; `dtype` or `torch_dtype`: of its weights.

        Raises UserError for a folder that holds another network's weights.
        """
        hub = {name: given[name] for name in HUB if name in given}
        folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, **hub))
        config = config or NlscaleConfig.from_pretrained(folder)
        asked = given.get("dtype", given.get("torch_dtype"))
        model = cls(config, getattr(torch, asked, None) if isinstance(asked, str) else asked)
        files, leaves = located(folder), {leaf.name: leaf for leaf in model.leaves}
        if files.keys() != leaves.keys():
            raise ValueError(
                f"{folder} holds other tensors than its config.json: {sorted(files.keys() ^ leaves.keys())[:3]}"
            )
        for file in sorted(set(files.values())):
            with safe_open(file, "pt") as tensors:
                for name in (name for name, at in files.items() if at == file):
                    leaves[name].value.copy_(tensors.get_tensor(name))
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Never: raises NotImplementedError."""
        raise NotImplementedError(
            "the folder that this network came from is its saved form: copy it, or `nlscale export` again"
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: Reader | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Reading:
        """What comes next after each of the tokens (B, T), or the last `logits_to_keep` of them. `state`: of the tokens
        before, which moves on; `labels` (B, T), -100 where none: gives the mean loss of the next tokens.

        Raises ValueError for padding, and beyond `config.max_position_embeddings` tokens of a row.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "memories take every token in: rows of different lengths must be read apart, without padding"
            )
        reading = reader(self.network, len(input_ids)) if state is None else state
        parts = [reading.read(part, part == self.config.bos_token_id) for part in input_ids.split(self.piece, 1)]
        kept = 0 if labels is not None else logits_to_keep
        logits = reading.predicted(torch.cat(parts)[-kept:]).transpose(0, 1)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Reading(loss=loss, logits=logits, state=reading)

    def generate(self, *given: Any, **named: Any) -> Any:
        """As transformers has it, but for beams: a state belongs to its row. Raises ValueError for those."""
        settings = named.get("generation_config") or self.generation_config
        if named.get("num_beams", getattr(settings, "num_beams", 1) or 1) > 1:
            raise ValueError("num_beams > 1: a row's memories cannot be handed to another row; num_beams=1 works")
        return super().generate(*given, **named)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: Reader | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The tokens that have not been read."""
        past = 0 if state is None else state.past
        mask = None if past else attention_mask  # of what came: rows that have ended go on with padding, unheard
        return {"input_ids": input_ids[:, past:], "state": state, "attention_mask": mask, "logits_to_keep": 1}

    def _update_model_kwargs_for_generation(
        self, outputs: Reading, model_kwargs: dict[str, Any], **named: Any
    ) -> dict[str, Any]:
        found: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **named)
        return {**found, "state": outputs.state}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def longer(config: NlscaleConfig) -> dict[str, Any]:
    """The run's words, for rows as long as the config says, up to whole rows of training."""
    trained = config.run["data"]["sequence"]
    rows = -(-int(config.max_position_embeddings) // trained)
    return {**config.run, "data": {**config.run["data"], "sequence": rows * trained}}


@cache
def alone() -> World:
    """This process as a world of its own, which it joins once; the environment and what draws stay as they were. Where it
    has joined others already, whose every rank then loads the network, as one of them.
    """
    before = {name: os.environ.get(name) for name in PLACES}
    if not is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    drawing = torch.random.get_rng_state(), random.getstate()
    try:
        return join(Parallel(), Cluster(), 0)
    finally:
        torch.random.set_rng_state(drawing[0])
        random.setstate(drawing[1])
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
