"""Tasks that a trained network's memory can fail: rows that tell something and ask for it (`nlscale eval --tasks`)."""

from collections.abc import Callable
from dataclasses import dataclass

from nlscale.tasks import adaptation, continual, needle, recall, shift, states
from nlscale.tasks.trial import Material, Trial


@dataclass(frozen=True)
class Task:
    """`made`: its rows, of held-out text; `tokens`: of the longest of them, where training's rows have so many."""

    about: str
    made: Callable[[Material], list[Trial]]
    tokens: Callable[[int], int]


TASKS = {
    "recall": Task(recall.ABOUT, recall.made, recall.tokens),
    "needle": Task(needle.ABOUT, needle.made, needle.tokens),
    "shift": Task(shift.ABOUT, shift.made, shift.tokens),
    "adaptation": Task(adaptation.ABOUT, adaptation.made, adaptation.tokens),
    "continual": Task(continual.ABOUT, continual.made, continual.tokens),
    "states": Task(states.ABOUT, states.made, states.tokens),
}
