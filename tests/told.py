"""The program in a process of its own that costs no imports: a fork, whose terminal is two files."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from nlscale.cli import main
from nlscale.testing import ranks


class Told(NamedTuple):
    """How it ended, and what it said."""

    code: int
    out: str
    err: str


def told(*arguments: str) -> Told:
    """Of one command."""
    return ranks(1, inside, arguments)[0]  # type: ignore[no-any-return]


def inside(arguments: tuple[str, ...]) -> Told:
    """The same, in the fork."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        return Told(main(arguments), *(file.read_text() for file in files))
