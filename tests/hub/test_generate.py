"""`nlscale generate`, from trained runs of all kinds: what the network says to the whole text, drawn as asked."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nlscale.cli import main
from nlscale.config.errors import UserError
from nlscale.config.run import Run
from nlscale.data.tokenise import Tokeniser, make
from nlscale.hub.generate import Said, continued
from nlscale.hub.opened import opened, source
from nlscale.hub.sampling import Sampling
from nlscale.model.reader import Reader, reader
from nlscale.runtime.folder import Folder
from nlscale.testing import ranks
from nlscale.train.loop import train
from tests.corpus import small_run
from tests.faults import flip
from tests.told import Told, inside, told

SHORT = ["train.steps=12", "checkpoint.interval=6", "optim.lr=0.01"]
LEARNING = (
    "levels=[{name: quick, period: 8, unit: token, width: 0.25}, {name: fast, period: 1, width: 0.5}, "
    "{name: slow, period: 4, width: 0.25}]"
)
KINDS = {
    "hope-attention": ["parallel.tensor=2"],
    "hope": ["model.mixer=self_modifying", "model.self_modifying.chunk=8", "model.self_modifying.maker_chunk=16"],
    "learning": [LEARNING, "model.inner.lr=1.0", "model.reset=never", "data.shuffle=false"],
}
PROMPT = "memory learns at"


@pytest.fixture(scope="module")
def trained(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each kind; the first of two tensor-parallel ranks."""
    runs = {}
    for kind, said in KINDS.items():
        runs[kind] = small_run(prepared, tmp_path_factory.mktemp(kind), *SHORT, *said)
        (Path(runs[kind].folder) / "config.yaml").write_text(
            ""
        )  # that this is a run: what counts is in its checkpoints
        ranks(runs[kind].parallel.ranks, train, runs[kind])
    return runs


def greedy(run: Run, count: int) -> tuple[list[int], list[int]]:
    """Likeliest tokens one by one, and by reading all of the text anew for each."""
    found = source(Folder(Path(run.folder)), None)
    (ids,) = found.tokeniser.encode([PROMPT])
    with opened(found.long(len(ids) + count), found.path) as (model, _):
        likeliest = Sampling(temperature=0)
        on = list(continued(reader(model), ids, count, found.tokeniser, likeliest, 7))
        anew = list(ids)
        for _ in range(count):
            reading, tokens = reader(model), torch.tensor([anew])
            x = reading.read(tokens, tokens == found.tokeniser.document)
            anew.append(int(reading.predicted(x[-1:])[0, 0, : found.tokeniser.vocabulary].argmax()))
    return on, anew[len(ids) :]


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_is_reading_all_anew_beyond_the_rows_of_training(kind: str, trained: dict[str, Run]) -> None:
    ((on, anew),) = ranks(1, greedy, trained[kind], 60)
    assert on == anew[: len(on)] and len(on) >= 40  # rows of training have 32 tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_a_text(kind: str, trained: dict[str, Run]) -> None:
    asked = ["generate", trained[kind].folder, "--prompt", PROMPT, "--tokens", "40"]
    first = told(*asked)
    assert first.code == 0 and first.out.startswith(PROMPT) and first.out.endswith("\n")
    assert "step 12: 17 tokens read in" in first.err
    assert "40 made" in first.err or "then the document ended" in first.err
    for more, same in (([], True), (["--seed", "1"], False), (["--temperature", "0"], False), (["--step", "6"], False)):
        assert (told(*asked, *more).out == first.out) is same, more


def test_two_tensor_parallel_ranks_say_the_same(trained: dict[str, Run]) -> None:
    asked = ["generate", trained["hope"].folder, "--prompt", PROMPT, "--tokens", "40", "--temperature", "0"]
    one, two = told(*asked), told(*asked, "parallel.tensor=2")
    assert one.code == two.code == 0 and one.out == two.out and len(one.out) > len(PROMPT) + 20


def test_the_prompt_may_be_a_file_or_nothing(trained: dict[str, Run], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    ways = (["--prompt", PROMPT], ["--prompt-file", str(tmp_path / "prompt.txt")])
    said, same = (told("generate", trained["hope"].folder, "--tokens", "8", *way).out for way in ways)
    assert said == same and said.startswith(PROMPT)
    assert "step 12: 1 tokens read in" in told("generate", trained["hope"].folder, "--tokens", "8").err


MISTAKES = {
    "no such run": (["generate", "nowhere"], "no run 'nowhere'"),
    "tokens": (["--tokens", "0"], "--tokens 0 must lie between 1 and 1048576"),
    "too many": (["--tokens", "2000000000000"], "must lie between 1 and 1048576"),
    "no text": (["--prompt", "\udcff"], "'\\udcff' is no UTF-8"),
    "temperature": (["--temperature", "-1"], "--temperature -1.0 must not be negative"),
    "seed": (
        ["--seed", "99999999999999999999"],
        "--seed 99999999999999999999 must not be negative, and below 2147483648",
    ),
    "top-p": (["--top-p", "0"], "--top-p 0.0 must lie above 0"),
    "top-k": (["--top-k", "-1"], "--top-k -1 must not be negative"),
    "step": (["--step", "7"], "no checkpoint of step 7; it has 12, 6"),
    "pipeline": (["parallel.pipeline=2"], "a run is read with parallel.pipeline=1, and split by parallel.tensor alone"),
    "sequence": (["parallel.tensor=2", "--parallel.sequence=true"], "a run is read with parallel.sequence=false"),
    "heads": (["parallel.tensor=3"], "model.heads=4 cannot be split"),
    "another shape": (["model.width=64"], "overrides may change how a run is read, not its shape"),
    "misspelt": (["model.widht=64"], "Key 'widht' not in 'Model'"),
    "file": (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt: No such file"),
    "both": (["--prompt", "a", "--prompt-file", "b"], "give one of them"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, trained: dict[str, Run]) -> None:
    given, answer = MISTAKES[mistake]
    said = told(*(given if given[0] == "generate" else ["generate", trained["hope"].folder, *given]))
    assert said.code == 78 and answer in said.err and len(said.err.splitlines()) == 1 and not said.out


def broken(run: Run, what: str) -> None:
    """A bit of a shard, or the facts."""
    folder = Path(run.folder) / "checkpoints/step-00000002"
    if what == "shard":
        flip(next(folder.glob("*.distcp")), random.Random(0))
    else:
        (folder / "train_state.json").write_text("{" if what == "torn" else "{}")


@pytest.mark.parametrize("what", ["shard", "torn", "other"])
def test_a_damaged_checkpoint_is_not_read(what: str, prepared: str, tmp_path: Path) -> None:
    run = small_run(prepared, tmp_path / "run", "train.steps=2", "checkpoint.interval=2")
    ranks(1, train, run)
    broken(run, what)
    for more in ([], ["parallel.tensor=2"]):
        said = told("generate", run.folder, *more)
        assert said.code == 78 and "step-00000002 is damaged" in said.err and len(said.err.splitlines()) == 1


def in_a_job(folder: str) -> Told:
    """Where a job has given this process a rank among four."""
    os.environ.update(SLURM_PROCID="1", SLURM_NTASKS="4", SLURM_LOCALID="1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    return inside(("generate", folder, "--prompt", PROMPT, "--tokens", "3"))


def test_it_reads_alone_whatever_rank_a_job_has_given_it(trained: dict[str, Run]) -> None:
    (said,) = ranks(1, in_a_job, trained["hope"].folder)
    assert said.code == 0 and said.out.startswith(PROMPT)


def unheard(folder: str) -> int:
    """The program's code where nobody reads what it says."""
    reads, writes = os.pipe()
    os.close(reads)
    os.dup2(writes, 1)
    return main(["generate", folder, "--prompt", PROMPT])


def interrupted(folder: str) -> int:
    """The same where Ctrl-C comes while it reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "read", lambda *_: signal.raise_signal(signal.SIGINT))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return main(["generate", folder, "--prompt", PROMPT])


def test_it_ends_quietly_where_nobody_listens_or_somebody_has_heard_enough(trained: dict[str, Run]) -> None:
    assert ranks(1, unheard, trained["hope"].folder) == [141]
    assert ranks(1, interrupted, trained["hope"].folder) == [130]


def shares(logits: list[float], **given: float) -> list[float]:
    return Sampling(**given).likely(torch.tensor([logits])).tolist()[0]  # type: ignore[arg-type]


def test_tokens_are_drawn_as_asked() -> None:
    logits = [2.0, 1.0, 0.0, 1.5]
    plain = torch.tensor(logits).double().softmax(0)
    torch.testing.assert_close(torch.tensor(shares(logits, temperature=1)), plain.float(), rtol=1e-6, atol=0)
    assert shares(logits, temperature=0) == [1, 0, 0, 0]
    assert shares(logits, temperature=0.5)[0] > plain[0]
    two = shares(logits, temperature=1, top_k=2)
    assert two[1] == two[2] == 0 and abs(two[0] / two[3] - plain[0] / plain[3]) < 1e-6
    assert shares(logits, temperature=1, top_p=1e-9) == [1, 0, 0, 0]
    three = shares(logits, temperature=1, top_p=float(plain[0] + plain[3]) + 0.01)
    assert three[2] == 0 and min(three[0], three[1], three[3]) > 0
    sampling = Sampling(temperature=1, seed=3)
    generator, drawn = sampling.generator(), []
    for _ in range(4000):
        drawn.append(int(sampling.draw(torch.tensor([logits]), generator)))
    counted = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    assert (counted - plain).abs().max() < 0.03
    with pytest.raises(UserError):
        Sampling(temperature=float("nan"))


def test_the_end_of_a_document_ends_it() -> None:
    """And what a draw may not give is never drawn: tokens that only the model's rounded vocabulary has."""

    class Reading:
        starts = torch.zeros(1, 0)

        def read(self, tokens: Tensor, starts: Tensor) -> Tensor:
            self.last = int(tokens[0, -1])
            return torch.zeros(1, 1, 1)

        def predicted(self, x: Tensor) -> Tensor:
            scores = torch.full((1, 1, 300), -10.0)
            scores[0, 0, 299] = 100.0
            scores[0, 0, 0 if self.last == 101 else self.last + 1] = 10.0
            return scores

    likeliest, tokeniser = Sampling(temperature=0), make("bytes", ())
    assert list(continued(Reading(), [0, 98], 10, tokeniser, likeliest, 1)) == [99, 100, 101]  # type: ignore[arg-type]
    assert list(continued(Reading(), [0, 98], 2, tokeniser, likeliest, 1)) == [99, 100]  # type: ignore[arg-type]


TEXT = "naïve 漢字 🙂, def f(x):\n    return x  # 終"


@pytest.mark.parametrize("name", ["bytes", "bpe:280"])
def test_text_is_told_in_whole_characters(name: str) -> None:
    tokeniser: Tokeniser = make(name, ["def return " * 9])
    (ids,) = tokeniser.encode([TEXT])
    said = Said(tokeniser)
    parts = [said.add(token) for token in ids[1:]]
    assert "".join(parts) + said.rest() == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts) and "" in parts
    torn = Said(tokeniser)
    told = "".join(torn.add(token) for token in ids[1 : 1 + next(i for i, part in enumerate(parts) if not part) + 1])
    assert torn.rest().startswith("\N{REPLACEMENT CHARACTER}") and TEXT.startswith(told)
