"""What a Hugging Face folder says beside its tensors: the network, where it is no Llama, and how texts become tokens."""

import json
from typing import Any

from tokenizers import Tokenizer, processors

from nlscale.config.read import plain
from nlscale.config.run import Run
from nlscale.data.tokenise import Tokeniser, of_bytes

FURTHER = 8  # rows of training's length that a network is built for, unless the reader asks for more
KEPT = {"data": ("sequence",), "train": ("precision", "kernels")}  # what a network that is only read takes of a run


def own(run: Run, document: int, pace: float) -> dict[str, Any]:
    """The `config.json` of a network of ours: what a reader wants of any, and the run's own words for the rest.

    `document`: the token that begins and ends a text; `pace`: factor on the rate of levels that move inside rows.
    """
    model, told = run.model, plain(run)
    kept = {section: {name: told[section][name] for name in names} for section, names in KEPT.items()}
    return {
        "architectures": ["NlscaleForCausalLM"],
        "model_type": "nlscale",
        "auto_map": {
            "AutoConfig": "modeling_nlscale.NlscaleConfig",
            "AutoModelForCausalLM": "modeling_nlscale.NlscaleForCausalLM",
        },
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": FURTHER * run.data.sequence,
        "tie_word_embeddings": False,
        "bos_token_id": document,
        "eos_token_id": document,
        "pace": pace,
        "run": {"model": told["model"], "levels": told["levels"], **kept},
    }


def words(tokeniser: Tokeniser, sequence: int) -> dict[str, dict[str, Any]]:
    """The small files of a folder, by their names: a text begins and ends with the document token."""
    token = speaking(tokeniser).id_to_token(tokeniser.document)
    ends = {"bos_token_id": tokeniser.document, "eos_token_id": tokeniser.document}
    return {
        "generation_config.json": {**ends, "pad_token_id": tokeniser.document},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), token),
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": FURTHER * sequence,
        },
    }


def speaking(tokeniser: Tokeniser) -> Tokenizer:
    """A library's tokeniser that puts the document token before a text, as ours do."""
    made = Tokenizer.from_str((tokeniser.tokenizer or of_bytes()).to_str())
    token = made.id_to_token(tokeniser.document)
    made.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokeniser.document)]
    )
    return made


def bare(tokenizer: Tokenizer) -> str:
    """What a library's tokeniser makes of a text, without what it puts around it: two that agree give the same tokens."""
    said = json.loads(tokenizer.to_str())
    for name in ("post_processor", "truncation", "padding"):
        said.pop(name, None)
    return json.dumps(said, sort_keys=True)
