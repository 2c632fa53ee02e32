"""`nlscale export`: transformers reads the folder, and says what the run says; what is no Llama is built by nlscale."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from nlscale.config.run import Run
from nlscale.data.tokenise import make
from nlscale.hub import exported
from nlscale.hub.described import speaking
from nlscale.hub.generate import continued
from nlscale.hub.opened import opened, source
from nlscale.hub.sampling import Sampling
from nlscale.model.reader import reader
from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.faults import flip
from tests.foreign import AutoModelForCausalLM, AutoTokenizer
from tests.hub.test_generate import KINDS as MEMORIES
from tests.hub.test_import import says, some_tokens, they_say
from tests.told import told

SHORT = ["train.steps=8", "checkpoint.interval=4", "optim.lr=0.01"]
LLAMAS = {
    "hope-attention": ["model.gains=true", "model.rope_scaling={type: llama3, factor: 2.0, original: 16}"],
    "window": ["model.window=5", "model.tied=true", "model.vocabulary=384"],
    "still": [*MEMORIES["learning"]],
}
OURS = {
    "hope": MEMORIES["hope"],
    "learning": MEMORIES["learning"],
    "chain": ["model.variant=sequential", "model.activation=gelu", "model.tied=true"],
    "loops": ["model.loops=2"],
}
PROMPT = "memory learns at"


@pytest.fixture(scope="module")
def trained(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each kind."""
    runs = {}
    for kind, said in {**LLAMAS, **OURS}.items():
        runs[kind] = small_run(prepared, tmp_path_factory.mktemp(kind), *SHORT, *said)
        (Path(runs[kind].folder) / "config.yaml").write_text("")  # that this is a run
        ranks(1, train, runs[kind])
    return runs


def wrote(run: Run, out: Path, *said: str) -> dict:
    """`nlscale export`, and the config.json that it wrote."""
    done = told("export", run.folder, "--out", str(out), *said)
    assert done.code == 0, done.err
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("kind", LLAMAS)
def test_what_a_llama_computes_is_a_llama(kind: str, trained: dict[str, Run], tmp_path: Path) -> None:
    still = ["model.writes=false"] if kind == "still" else []
    config = wrote(trained[kind], tmp_path / "out", *still)
    assert config["model_type"] == ("mistral" if kind == "window" else "llama")
    assert not (tmp_path / "out" / "modeling_nlscale.py").exists()
    tokens = some_tokens() % 256 + 1
    theirs = they_say(tmp_path / "out", tokens)
    (ours,) = ranks(1, unmoved, trained[kind].folder, tokens, still)
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def unmoved(run: str, tokens: Tensor, said: list[str]) -> Tensor:
    """A run's scores, read with overrides."""
    found = source(Folder(Path(run)), None, said)
    with opened(found.long(tokens.shape[1]), found.path) as (model, _):
        reading = reader(model, len(tokens))
        return reading.predicted(reading.read(tokens, torch.zeros_like(tokens, dtype=torch.bool))).transpose(0, 1)


def both(run: str, folder: str) -> None:
    """Of a folder that nlscale must build: it says what the run says, at once, in parts and drawn, in one process."""
    tokens = some_tokens() % 256 + 1
    ours = says(run, tokens)
    found = source(Folder(Path(run)), None)
    (ids,) = found.tokeniser.encode([PROMPT])
    with opened(found.long(len(ids) + 30), found.path) as (model, _):
        drawn = list(continued(reader(model), ids, 30, found.tokeniser, Sampling(temperature=0), 7))
    torch.manual_seed(5)
    random.seed(5)
    surroundings = dict(os.environ)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert dict(os.environ) == surroundings
    assert random.random() == random.Random(5).random()
    assert type(model).__name__ == "NlscaleForCausalLM" and model.dtype == torch.float32
    said = model(tokens)
    torch.testing.assert_close(said.logits, ours, rtol=1e-5, atol=1e-5)
    first = model(tokens[:, :20])
    rest = model(tokens[:, 20:], state=first.state, logits_to_keep=5)
    torch.testing.assert_close(rest.logits, ours[:, -5:], rtol=1e-5, atol=1e-5)
    labels = tokens.masked_fill(tokens % 7 == 0, -100)
    each = -ours[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    mean = each[labels[:, 1:] >= 0].mean()
    torch.testing.assert_close(model(tokens, labels=labels).loss, mean, rtol=1e-5, atol=1e-5)
    read = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    assert read.input_ids[0].tolist() == ids
    (made,) = model.generate(**read, max_new_tokens=30, do_sample=False).tolist()
    assert made[len(ids) :] == drawn or made[len(ids) : -1] == drawn  # whose end theirs says, too
    two = model.generate(tokens[:, :9], max_new_tokens=12, do_sample=False)
    for row, alone in zip(two, tokens[:, None, :9], strict=True):
        same = model.generate(alone, max_new_tokens=12, do_sample=False)[0]
        assert torch.equal(row[: len(same)], same)
    for refused, answer in (
        (lambda: model.generate(tokens, num_beams=2), "num_beams=1 works"),
        (lambda: model(tokens, attention_mask=tokens > 9), "without padding"),
        (lambda: model(tokens.repeat(1, 8)), "the model was built for 256"),
    ):
        with pytest.raises(ValueError, match=answer):
            refused()
    with pytest.raises(NotImplementedError, match="copy it"):
        model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, max_position_embeddings=400)
    assert again(tokens.repeat(1, 8)).logits.shape == (2, 384, ours.shape[-1])


@pytest.mark.parametrize("kind", OURS)
def test_what_no_llama_computes_is_built_by_nlscale(kind: str, trained: dict[str, Run], tmp_path: Path) -> None:
    config = wrote(trained[kind], tmp_path / "out")
    assert config["architectures"] == ["NlscaleForCausalLM"]
    assert trained[kind].folder not in json.dumps(config) and trained[kind].data.path not in json.dumps(config)
    ranks(1, both, trained[kind].folder, str(tmp_path / "out"))


def beside(folder: str) -> tuple[int, Tensor]:
    """Of ranks that have met before, each loads the network and reads for itself."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=rank, world_size=size)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert dist.get_rank() == rank and dist.get_world_size() == size
    return rank, model(some_tokens() % 256 + 1).logits


def test_ranks_that_have_met_load_it_each(trained: dict[str, Run], tmp_path: Path) -> None:
    wrote(trained["hope"], tmp_path / "out")
    (first, one), (second, two) = ranks(2, beside, str(tmp_path / "out"))
    assert (first, second) == (0, 1)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def elsewhere(folder: str) -> bool:
    """A name is looked for on the hub, whose folder may hold other weights than its config.json says."""
    told_of: list[tuple] = []
    import nlscale.hub.modelling as modelling  # what it takes of transformers costs seconds

    modelling.snapshot_download = lambda name, **hub: told_of.append((name, hub)) or folder  # type: ignore[attr-defined]
    model = modelling.NlscaleForCausalLM.from_pretrained("some/where", revision="main", dtype="bfloat16")
    assert told_of == [("some/where", {"revision": "main"})] and model.dtype == torch.bfloat16
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    config["run"]["model"]["layers"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds other tensors than its config.json"):
        modelling.NlscaleForCausalLM.from_pretrained(folder)
    return True


def test_a_name_is_looked_for_on_the_hub(trained: dict[str, Run], tmp_path: Path) -> None:
    wrote(trained["hope"], tmp_path / "out")
    assert ranks(1, elsewhere, str(tmp_path / "out")) == [True]


def test_files_have_their_share_and_the_steps_their_own_weights(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained["hope-attention"]
    wrote(run, tmp_path / "one", "--dtype", "bfloat16")
    wrote(run, tmp_path / "early", "--dtype", "bfloat16", "--step", "4")
    monkeypatch.setattr(exported, "SHARD", 9000)
    out = tmp_path / "many"
    config = wrote(run, out, "--dtype", "bfloat16")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    one, early = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "early"))
    many = {}
    for file in sorted(set(index["weight_map"].values())):
        part = load_file(out / file)
        assert all(index["weight_map"][name] == file for name in part)
        assert len(part) == 1 or sum(each.nbytes for each in part.values()) <= 9000
        many |= part
    assert many.keys() == one.keys() == index["weight_map"].keys() and config["torch_dtype"] == "bfloat16"
    assert all(torch.equal(many[name], one[name]) and one[name].dtype == torch.bfloat16 for name in one)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in one.values())
    assert any(not torch.equal(early[name], one[name]) for name in one)
    tokens = some_tokens() % 256 + 1
    assert torch.equal(they_say(out, tokens), they_say(tmp_path / "one", tokens))


@pytest.mark.parametrize("name", ["bytes", "bpe:400"])
def test_texts_become_the_same_tokens(name: str, tmp_path: Path) -> None:
    text = "memory learns <|doc|> at its own pace \N{GREEK SMALL LETTER ETA}\N{BUG}\n\t" + bytes(range(128)).decode()
    ours = make(name, [text * 3])
    speaking(ours).save(str(tmp_path / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    (ids,) = ours.encode([text])
    assert theirs.encode(text).ids == ids and theirs.decode(ids) == text == ours.decode(ids)


def test_mistakes_are_one_line(trained: dict[str, Run], tmp_path: Path) -> None:
    run, out = trained["hope"].folder, tmp_path / "out"
    (tmp_path / "there").mkdir()
    for given, answer in (
        (["nowhere", "--out", str(out)], "no run 'nowhere'"),
        ([run, "--out", str(tmp_path / "there")], "is there already; remove it, or give another folder"),
        ([run, "--out", str(out), "--dtype", "int8"], "--dtype int8 is none of float32, bfloat16, float16"),
        ([run, "--out", str(out), "--step", "5"], "no checkpoint of step 5; it has 8, 4"),
        ([run, "--out", "/proc/nowhere/out"], "--out /proc/nowhere/out: No such file"),
        ([run, "--out", str(out), "model.width=64"], "overrides may change how a run is read, not its shape"),
        ([run, "--out", str(out), "model.layers=1"], "overrides may change how a run is read, not its shape"),
    ):
        said = told("export", *given)
        assert said.code == 78 and answer in said.err and len(said.err.splitlines()) == 1, said.err
    assert not out.exists()


def test_a_damaged_checkpoint_is_not_exported(prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", "train.steps=1", "checkpoint.interval=1")
    ranks(1, train, run)
    (tmp_path / "run" / "config.yaml").write_text("")
    flip(next((tmp_path / "run" / "checkpoints" / "step-00000001").glob("*.distcp")), random.Random(0))
    said = told("export", run.folder, "--out", str(tmp_path / "out"))
    assert said.code == 78 and "is damaged" in said.err and not (tmp_path / "out").exists()
