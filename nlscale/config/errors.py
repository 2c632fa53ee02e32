"""What a run's end means to whoever started it: exit codes, and the one error that is the user's to mend."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any

FINISHED = 0
SAVED_ON_SIGNAL = 75
USER_ERROR = 78
STOPPED_ON_PURPOSE = 93


class UserError(Exception):
    """The config, the data or the folder is wrong. The message is shown alone, without a traceback; exit code 78."""


class SavedOnSignal(Exception):
    """A signal asked the run to stop; its state is saved and it wants to go on. Exit code 75."""


class StoppedOnPurpose(Exception):
    """Going on would not help: diverged, or no good checkpoint is left. Exit code 93."""


class BadHosts(RuntimeError):
    """What ran on some hosts is wrong or missing. A crash; a launcher may leave those hosts out."""

    def __init__(self, message: str, hosts: Sequence[str]) -> None:
        super().__init__(message)
        self.hosts = hosts


CODES: dict[type[Exception], int] = {
    UserError: USER_ERROR,
    SavedOnSignal: SAVED_ON_SIGNAL,
    StoppedOnPurpose: STOPPED_ON_PURPOSE,
}


ORDERLY = (FINISHED, *CODES.values())  # any other is a crash


def code_of(error: Exception) -> int:
    """Exit code of an orderly end; 1 for any other."""
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), 1)


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def positive(section: str, **values: float | Sequence[float] | None) -> None:
    """Raises UserError unless all that are said are at least 1 (whole numbers) or above 0."""
    for name, value in values.items():
        for each in () if value is None else value if isinstance(value, Sequence) else (value,):
            least = "at least 1" if isinstance(each, int) else "above 0"
            require(each >= isinstance(each, int) and each > 0, f"{section}.{name}={each} must be {least}")


def finite(section: Any, name: str = "") -> None:
    """Raises UserError where a number of a section, or of a section in it, is none or has no end."""
    for part in fields(section):
        value, place = getattr(section, part.name), f"{name}{part.name}"
        for index, each in enumerate(value if isinstance(value, list) else [value]):
            if is_dataclass(each):
                finite(each, f"{place}." if each is value else f"{place}.{getattr(each, 'name', index)}.")
        require(not isinstance(value, float) or isfinite(value), f"{place}={value} must be a number that has an end")


def nearest(value: int, multiple: int) -> str:
    """The multiples on both sides of `value`, in words."""
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else f"{multiple}"


def meant(said: str, known: Iterable[str]) -> str:
    """Which of the known names is nearly what was said, in words; nothing where none is."""
    found = get_close_matches(said, known, 1)
    return f" (did you mean '{found[0]}'?)" if found else ""


def divisors(value: int) -> list[int]:
    """All divisors of `value`, ascending."""
    return [d for d in range(1, value + 1) if value % d == 0]
