"""`nlscale import`: a run begins with a Llama's network, says what transformers says by it, and goes on from there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from nlscale.config.read import read
from nlscale.config.rope import RopeScaling
from nlscale.data.loader import HeldOut
from nlscale.data.write import Preparation, prepare
from nlscale.hub.opened import opened, source
from nlscale.model.reader import reader
from nlscale.model.rope import SCALINGS
from nlscale.runtime.folder import Folder, read_lines
from nlscale.testing import ranks
from nlscale.train.convert import whole
from nlscale.train.loop import train
from nlscale.train.pieces import load, stored
from tests.corpus import write_corpus
from tests.foreign import (
    ROPE_INIT_FUNCTIONS,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from tests.told import Told, told

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "initializer_range": 0.3,
}
LONGER = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "levels": ({"rope_theta": 5e5, "rope_scaling": LONGER}, []),
    "plain": ({"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, ["use.levels=plain"]),
    "gains": ({"num_key_value_heads": 4, "rope_scaling": {"type": "linear", "factor": 2.0}}, ["model.gains=true"]),
    "window": ({"sliding_window": 7}, ["use.levels=five"]),
}
INSIDE = (
    "levels=[{name: quick, period: 8, unit: token, width: 0.25}, {name: calm, period: 16, unit: token, width: 0.25}, "
    "{name: fast, period: 1, width: 0.5}]"
)
KINDS["inside"] = ({}, [INSIDE, "model.writes=false"])
SMALL = ["data.sequence=32", "train.precision=fp32", "cluster.threads=1", "log.wandb=disabled", "log.peak_flops=1e10"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of 32 tokens of a small BPE."""
    root = tmp_path_factory.mktemp("rows")
    corpus = write_corpus(root / "in", documents=200)
    prepare(Preparation(sources=(str(corpus),), out=str(root / "out"), sequence=32, tokeniser="bpe:300", held_out=0.1))
    return str(root / "out")


def made(folder: Path, dataset: str, changes: dict[str, Any], **saved: Any) -> Path:
    """A folder with a network of random weights, as transformers saves it."""
    torch.manual_seed(0)
    kinds = (MistralConfig, MistralForCausalLM) if "sliding_window" in changes else (LlamaConfig, LlamaForCausalLM)
    kinds[1](kinds[0](**{**SIZES, **changes})).save_pretrained(folder, **saved)
    Tokenizer.from_file(f"{dataset}/tokenizer.json").save(str(folder / "tokenizer.json"))
    return folder


def take(folder: Path, dataset: str, run: Path, *said: str) -> Told:
    """`nlscale import`."""
    return told("import", str(folder), f"run.folder={run}", f"data.path={dataset}", *SMALL, *said)


def says(run: str, tokens: Tensor, step: int | None = None) -> Tensor:
    """A run's scores (B, T, V) of what comes next."""
    found = source(Folder(Path(run)), step)
    with opened(found.long(tokens.shape[1]), found.path) as (model, _):
        reading = reader(model, len(tokens))
        return reading.predicted(reading.read(tokens, torch.zeros_like(tokens, dtype=torch.bool))).transpose(0, 1)


def rows_of(run: str, count: int) -> Tensor:
    """The held-out rows (B, T + 1) that a run evaluates on."""
    found = source(Folder(Path(run)), None)
    with opened(found.run, found.path) as (_, world):
        return torch.tensor(HeldOut(found.run.data, count, 1, world).rows()[0].astype("int64"))


def they_say(folder: Path, tokens: Tensor) -> Tensor:
    """transformers' scores."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def some_tokens() -> Tensor:
    return torch.randint(1, 300, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_the_network_said(kind: str, dataset: str, tmp_path: Path) -> None:
    changes, said = KINDS[kind]
    folder = made(tmp_path / "theirs", dataset, changes, max_shard_size="20KB" if kind == "levels" else "5GB")
    done = take(folder, dataset, tmp_path / "run", *said)
    assert done.code == 0 and "as step 0" in done.out, done.err
    tokens = some_tokens()
    (ours,) = ranks(1, says, str(tmp_path / "run"), tokens)
    theirs = they_say(folder, tokens)
    assert float((ours - theirs).abs().max()) < 2e-5 * float(theirs.abs().max())


def test_half_precision_is_kept_and_another_form_of_the_config_read(dataset: str, tmp_path: Path) -> None:
    """bfloat16 weights, and rotary positions as transformers 5 writes them."""
    folder = made(tmp_path / "theirs", dataset, {"rope_theta": 3e4})
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: each.bfloat16() for name, each in load_file(folder / "model.safetensors").items()}
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    assert take(folder, dataset, tmp_path / "run").code == 0
    assert read(str(tmp_path / "run" / "config.yaml")).model.rope_base == 3e4
    told("export", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--dtype", "bfloat16")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], each) for name, each in weights.items())


def test_it_loses_what_transformers_loses_and_learns_from_there(dataset: str, tmp_path: Path) -> None:
    """On held-out rows, then in training on one rank and on two, which end in the same weights; the next start goes on."""
    folder, found = made(tmp_path / "theirs", dataset, {}), {}
    for count in (1, 2):
        run = tmp_path / f"run{count}"
        steps = ["train.steps=6", "train.global_batch=4", "train.evaluate_rows=12", "train.recompute=none"]
        rest = ["model.attention=causal", "optim.lr=0.003", "checkpoint.interval=3", f"parallel.tensor={count}"]
        assert take(folder, dataset, run, *steps, *rest).code == 0
        if count == 1:
            assert told("eval", str(run), "--json", str(tmp_path / "loss.json")).code == 0
        for steps_now in (3, 6):
            said = read(str(run / "config.yaml"), [f"train.stop_at={steps_now}"])
            ranks(count, train, said)
        found[count] = [line["train/loss"] for line in read_lines(run / "metrics.jsonl") if "train/loss" in line]
        events = [line["event"] for line in read_lines(run / "events.jsonl")]
        assert events[0] == "import" and events.count("restore") == 2
    lost = json.loads((tmp_path / "loss.json").read_text())["loss"]
    (tokens,) = ranks(1, rows_of, str(tmp_path / "run1"), 12)
    theirs = F.cross_entropy(they_say(folder, tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])
    assert abs(lost - float(theirs)) < 1e-5 * lost
    assert len(found[1]) == 6 and found[1][-1] < found[1][0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[2]), rtol=1e-5, atol=1e-5)


def test_a_slow_level_may_be_held_to_the_weights_that_came(dataset: str, tmp_path: Path) -> None:
    """The import is the end of a task: anchors are what was imported, whatever the level has moved to since."""
    folder, run = made(tmp_path / "theirs", dataset, {}), tmp_path / "run"
    levels = "levels=[{name: fast, period: 1, width: 0.5}, {name: slow, period: 2, width: 0.5, anchor: 3.0}]"
    steps = ["train.steps=4", "train.global_batch=4", "train.evaluate_rows=0", "optim.lr=0.003", "checkpoint.keep=9"]
    assert take(folder, dataset, run, levels, *steps).code == 0
    ranks(1, train, read(str(run / "config.yaml")))
    name = "blocks.1.continuum.slow.up.weight"
    came, anchor, now = (
        whole_of(run, step, f"{kind}/{name}") for step, kind in ((0, "weights"), (4, "state.anchor"), (4, "weights"))
    )
    assert torch.equal(came, anchor) and not torch.equal(came, now)
    assert not torch.equal(came, load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"][:32])


def whole_of(run: Path, step: int, key: str) -> Tensor:
    """A tensor of a checkpoint."""
    path = Folder(run).checkpoint(step)
    found = torch.empty(stored(path)[key].shape)
    load({key: whole(found, False)}, path)
    return found


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    scaling = {**LONGER, "rope_type": kind}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_theta=1e3, rope_scaling=scaling)
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    own = RopeScaling(type=kind, factor=4.0, original=16)  # type: ignore[arg-type]
    frequency = 1e3 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ours = SCALINGS[kind](own, frequency)
    assert factor == 1 and not torch.equal(ours, frequency)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)


def edited(folder: Path, **changes: Any) -> None:
    """Changes config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: each for key, each in config.items() if each is not None}))


MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "another kind": ({"model_type": "gpt2"}, [], "model_type gpt2 is none of llama, mistral"),
    "bias": ({"attention_bias": True}, [], "attention_bias is True, which this network has not"),
    "activation": ({"hidden_act": "gelu"}, [], "hidden_act gelu must be silu"),
    "no width": ({"hidden_size": None}, [], "says no hidden_size"),
    "wide heads": ({"head_dim": 64}, [], "head_dim 64 must be hidden_size / num_attention_heads = 8"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn"}}, [], "rope_type yarn is none of default, linear, llama3"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, [], "rope_type linear says no factor"),
    "no mapping": ({"rope_scaling": ["linear"]}, [], "rope_scaling must be a mapping"),
    "another shape": ({"intermediate_size": 128}, [], "is (64, 32) torch.float32, and config.json wants (128, 32)"),
    "fewer layers": ({"num_hidden_layers": 1}, [], "holds model.layers.1.input_layernorm.weight"),
    "more layers": ({"num_hidden_layers": 3}, [], "holds no model.layers.2.input_layernorm.weight"),
    "width": ({}, ["model.width=64"], "model.width=64: "),
    "mixer": (
        {},
        ["model.mixer=linear", "model.linear.chunk=8"],
        "a network of the Llama family computes nothing of the kind",
    ),
    "chain": ({}, ["model.variant=sequential"], "model.variant=sequential: a network of the Llama family"),
    "levels": ({}, ["use.levels=none"], "use.levels=none: choose from"),
    "no data": ({}, ["data.path=nowhere"], "`nlscale data prepare SOURCE --out nowhere --sequence 32 --tokeniser "),
    "misspelt": ({}, ["model.widht=64"], "Key 'widht' not in 'Model'"),
    "no recipe": ({}, ["--recipe", "none"], "no recipe 'none'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, dataset: str, tmp_path: Path) -> None:
    changes, said, answer = MISTAKES[mistake]
    edited(made(tmp_path / "theirs", dataset, {}), **changes)
    done = take(tmp_path / "theirs", dataset, tmp_path / "run", *said)
    assert done.code == 78 and answer in done.err and len(done.err.splitlines()) == 1, done.err
    assert not (tmp_path / "run").exists()


def test_what_is_no_network_or_leads_elsewhere_is_refused(dataset: str, prepared: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "theirs", dataset, {}, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())

    def refused(path: Path, data: str = dataset) -> str:
        done = take(path, data, tmp_path / "run")
        assert done.code == 78 and len(done.err.splitlines()) == 1, done.err
        return done.err

    assert "is no folder; that of a Hugging Face model would do" in refused(tmp_path / "nowhere")
    assert "was prepared with another tokeniser than" in refused(folder, prepared)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole["weight_map"], "../outside.safetensors")}))
    assert "leads out of its folder" in refused(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole["weight_map"], "absent.safetensors")}))
    assert "absent.safetensors" in refused(folder)
    index.unlink()
    assert "weights are read from safetensors alone" in refused(folder)
    (folder / "model.safetensors").write_bytes(b"no such thing")
    assert "model.safetensors: " in refused(folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json is missing, or describes nothing" in refused(folder)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_is_left_alone(dataset: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "theirs", dataset, {})
    assert take(folder, dataset, tmp_path / "run").code == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    again = take(folder, dataset, tmp_path / "run", "optim.lr=1.0")
    assert again.code == 78 and "is a run already; another run.name would work" in again.err
    assert (tmp_path / "run" / "config.yaml").read_text() == before
