"""Stories: what a cluster does to a run. Several are told at a time, since most of a story is waiting."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster
from tests.slurm.runs import Submitted, interpreter, submit


@dataclass
class Scene:
    """Where a story happens."""

    slurm: Cluster
    data: str
    folder: Path
    whole: dict[str, Any]  # unbroken runs
    nodes: list[str]  # four, where no other story happens meanwhile

    def submit(self, *overrides: str, without: tuple[str, ...] = (), options: str = "", **more: Any) -> Submitted:
        """Of the program itself, on the story's own nodes but those `without`; `options`: further ones of sbatch."""
        others = [node for node in self.slurm.nodes if node not in self.nodes or node in without]
        words = [f'"--exclude={",".join(others)}"', *([options] if options else [])]
        own = ["cluster.exclusive=true", f"cluster.options=[{','.join(words)}]"]
        if "words" in more:
            more["options"] = more.pop("words")
        return submit(self.slurm, self.folder / "run", self.data, *own, *overrides, **more)

    def fault(self, what: str) -> list[str]:
        """Overrides that make ranks faulty."""
        return [f"cluster.python={interpreter(self.folder, 'faulty.py')}", f"cluster.environment.FAULT='{what}'"]

    def acted(self, acts: str, *overrides: str, nodes: int = 1, **more: Any) -> Submitted:
        """Of ranks' doubles."""
        double = [f"cluster.python={interpreter(self.folder, 'actor.py')}", f"cluster.environment.ACT='{acts}'"]
        return self.submit("cluster.tasks=1", *double, *overrides, nodes=nodes, **more)

    def spare(self, drained: bool) -> None:
        """Takes the last two of the nodes away, or gives them back."""
        how = ("state=drain", "reason=test") if drained else ("state=resume",)
        for name in self.nodes[2:]:
            self.slurm.said("scontrol", "update", f"nodename={name}", *how)

    def took(self, what: str, seconds: float) -> None:
        """A row of the table in launch/README.md; `pytest -s` shows it."""
        print(f"\n| {what} | {seconds:.1f} s |")


STORIES: dict[str, Callable[[Scene], None]] = {}


def story(function: Callable[[Scene], None]) -> Callable[[Scene], None]:
    STORIES[function.__name__] = function
    return function
