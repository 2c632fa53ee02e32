"""Every link and every command of the documentation: links lead somewhere; commands run, or at least parse to the end."""

import contextlib
import importlib.util
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nlscale.cli import build_parser, main
from nlscale.data.write import Preparation, prepare
from nlscale.verbs.saved import BENCHES
from tests.corpus import write_corpus
from tests.told import told

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("launch/*.md")),
    *sorted(ROOT.glob("kernels/**/*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
PLACEHOLDER = re.compile(r"[\[\]|]|\.\.\.| / |\b[A-Z]{2,}\b")
WORDS = ("nlscale", "make", "pytest", "python", "torchrun", "srun")


def commands(page: Path) -> Iterator[str]:
    """Commands of a page's blocks and lines, without comments and variables before them."""
    text = page.read_text()
    blocks = [line for block in FENCE.findall(text) for line in block.splitlines()]
    for line in [*blocks, *INLINE.findall(FENCE.sub("", text))]:
        said = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line.split("  #")[0].strip().removeprefix(".venv/bin/"))
        if said.split(" ")[0] in WORDS and " " in said:
            yield said


ALL = sorted({(str(page.relative_to(ROOT)), said) for page in PAGES for said in commands(page)})
CONCRETE = sorted(
    {
        said
        for _, said in ALL
        if said.startswith("nlscale ") and not PLACEHOLDER.search(said) and (len(said.split()) > 2 or "status" in said)
    }
)
FILL = {
    "RUN": "told",
    "DIR": "corpora/stdlib",
    "FILES": "in",
    "SOURCE": "in",
    "FILE": "one.safetensors",
    "FOLDER": "theirs",
    "FOLDER/tokenizer.json": "bytes",
}
FILL |= {"NAME": "h100", "N": "1"}
QUEUED = ("cancel", "submit", "bench")  # tests/slurm runs the first two; benches are looked at one by one below


def filled(said: str) -> Iterator[str]:
    """A command with names for its placeholders and without its options; each of several verbs."""
    plain = re.sub(r"\[[^\]]*\]|\.\.\.", "", said).replace("--out DIR", "--out made")
    several = re.match(r"(nlscale \w+) (\w+) / (\w+) (.*)", plain)
    for each in [f"{several[1]} {verb} {several[4]}" for verb in several.group(2, 3)] if several else [plain]:
        recipe = "125m-hope-attention" if each.startswith("nlscale plan") else "demo"
        yield " ".join({**FILL, "RECIPE": recipe}.get(word, word) for word in each.split())


FILLED = {
    each
    for _, said in ALL
    if said.startswith("nlscale ") and PLACEHOLDER.search(said) and said.split()[1] not in QUEUED
    if "bpe:32768" not in said  # more words than the tests' corpus has
    for each in filled(said)
}


def headings(page: Path) -> set[str]:
    """Anchors of a page, as the hosts of Markdown make them."""
    lines = [
        line.lstrip("#").strip().lower()
        for line in FENCE.sub("", page.read_text()).splitlines()
        if line.startswith("#")
    ]
    return {re.sub(r"[^\w\- ]", "", line).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("http"):
            assert re.fullmatch(r"https://[\w.\-]+(/[\w.\-/#%]*)?", link), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in headings(target), f"{page.name}: {link}"


def test_there_is_something_to_hold_the_documentation_to() -> None:
    assert len(ALL) > 40 and len(CONCRETE) > 12 and len(FILLED) > 8 and len(PAGES) >= 8


def options(verbs: list[str]) -> set[str]:
    """Every option of a verb, and of those below it."""
    parser = build_parser()
    for verb in verbs:
        below = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        if not below or verb not in below[0]:
            break
        parser = below[0][verb]
    found = {word for action in parser._actions for word in action.option_strings}
    for action in parser._actions:
        for other in action.choices.values() if isinstance(action.choices, dict) else ():
            found |= {word for each in other._actions for word in each.option_strings}
    return found


@pytest.mark.parametrize(("page", "said"), ALL)
def test_commands_name_what_there_is(page: str, said: str) -> None:
    """Verbs and options of the program, targets of make, modules, paths."""
    words = said.split()
    if words[0] == "nlscale":
        verbs = [word for word in words[1:3] if re.fullmatch("[a-z]+", word)]
        known = options(verbs)
        assert known != options([]), f"{page}: {said}: no such verb"
        for flag in re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", said):
            assert flag in known, f"{page}: {said}: {flag} is no option"
        if verbs[0] == "bench":
            named = said.split(" --")[0].split()[2:]
            assert {word for word in named if re.fullmatch("[a-z]+", word)} <= set(BENCHES), said
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), said
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/")), said
    elif "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None, said


LONG = {  # benches that are run with less to do, and why
    **dict.fromkeys(("kernels", "ladder"), "a GPU"),
    **dict.fromkeys(
        ("parts", "hops", "beyond", "states", "forgetting", "classes"), "models are trained, for up to an hour"
    ),
    **dict.fromkeys(("memories", "levels", "memory"), "many minutes of the whole machine"),
}
BENCHED = [said for said in CONCRETE if said.split()[1] == "bench" and said.split()[2] not in LONG]


@pytest.mark.matrix
@pytest.mark.parametrize("said", BENCHED)
def test_benches_print_their_tables(said: str, somewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a target is kept beside other work on this machine is not asked."""
    monkeypatch.chdir(somewhere)
    words = [*shlex.split(said)[1:], "--json", "table.json"]
    done = subprocess.run([sys.executable, "-m", "nlscale.cli", *words], capture_output=True, text=True, timeout=290)
    assert done.returncode in (0, 1) and not done.stderr.count("Traceback"), done.stderr
    rows = json.loads(Path("table.json").read_text())["rows"]
    assert len(rows) > 1 and all(math.isfinite(row["value"]) for row in rows)


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus that the demo's recipe names, and a run in it."""
    root = tmp_path_factory.mktemp("docs")
    source = write_corpus(root / "in", space=" 0123456789ABCDEF")  # as many tokens as tasks ask for
    out = str(root / "corpora" / "stdlib")
    prepare(Preparation(sources=(str(source),), out=out, sequence=256, tokeniser="bytes", held_out=0.1))
    web = str(root / "corpora" / "web")
    prepare(Preparation(sources=(str(source),), out=web, sequence=4096, tokeniser="bytes", held_out=0.3))
    return root


MADE = sorted({said for _, said in ALL if said.startswith("make ")})


@pytest.mark.parametrize("said", MADE)
def test_targets_of_make_resolve(said: str) -> None:
    """To commands, with all that they need; `.ci/run` runs the first two."""
    done = subprocess.run(
        ["make", "--dry-run", *shlex.split(said)[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "python" in done.stdout + done.stderr or ".venv/bin/" in done.stdout, done.stderr


IMPORTED = "runs/llama/config.yaml"
QUICK = ["train.steps=1", "train.evaluate_rows=2", "log.wandb=disabled"]
# They pretend a world, or join one, which this process is not to do.
JOINING = ("plan", "generate", "eval", "export", "import")


def trained(name: str, *more: str) -> None:
    """Has a run of one step by that name, of those words."""
    if not Path("runs", name, "checkpoints").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["train", "demo", f"run.name={name}", *more, *QUICK]) == 0


def brought(folder: str, said: list[str]) -> list[str]:
    """What imports a network that lies in `folder`, an exported one, to where nothing is."""
    trained("demo")
    shutil.rmtree("runs/llama", ignore_errors=True)
    if not Path(folder).exists():
        assert told("export", "demo", "--out", folder).code == 0
    return ["import", folder, *said, "run.name=llama", "data.path=corpora/stdlib", "data.sequence=256"]


def prepared(words: list[str]) -> list[str]:
    """The words of a command with less to do, what it needs being there."""
    verb, *rest = words
    named = next((word for word in rest if not word.startswith("-")), "")
    if words[:2] == ["train", IMPORTED]:
        assert told(*brought("theirs", [])).code == 0
        return [*words, *QUICK, "train.global_batch=4"]  # not its recipe's 64 rows
    if verb == "train":
        shutil.rmtree("runs", ignore_errors=True)
        return [*words, *QUICK]
    if verb == "submit":
        return [*words, *([] if "--dry-run" in words else ["--dry-run"])]
    if verb == "import":
        return brought(named, rest[1:])
    if verb in ("generate", "eval", "export"):
        trained(named)
    if verb in ("status", "plot", "logs", "checkpoint") and "--levels" not in words:
        trained("told", "parallel.tensor=1", "--nproc", "1")
    if verb == "export":
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    fewer = {"eval": ["--rows", "6"], "generate": ["--tokens", "8"]}
    return [*words, *fewer.get(verb, [])]


@pytest.mark.parametrize("said", sorted({*CONCRETE, *FILLED}))
def test_commands_run(said: str, somewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder with the demo's corpus: training for one step, submissions without sending them."""
    monkeypatch.chdir(somewhere)
    words = shlex.split(said)[1:]
    if words[0] == "bench":
        assert said in BENCHED or words[1] in LONG, said
        build_parser().parse_known_args(words)
        pytest.skip("`make matrices` runs it, a long one with less to do (test_docs_long.py)")
    words = prepared(words)
    if words[0] in JOINING:
        ended = told(*words)
        assert ended.code == 0, ended.err
        return
    with contextlib.redirect_stdout(io.StringIO()) as heard:
        code = main(words)
    refused = [line for line in heard.getvalue().splitlines() if line.startswith("! ")]
    # This machine's disk may be too small, and the rows here are for steps of a laptop.
    assert all("checkpoints of" in line or "the dataset has" in line for line in refused), refused
    assert code == (78 if refused else 0), said
