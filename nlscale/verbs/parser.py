"""The command line's mistakes are a user's, as any other: one line that says what was meant, and exit code 78."""

import argparse
import re
from typing import NoReturn

from nlscale.config.errors import UserError, meant

CHOICE = re.compile(r"invalid choice: '?(?P<said>.*?)'? \(choose from (?P<known>.*)\)")


class Parser(argparse.ArgumentParser):
    """Of the program and, as argparse makes them of the same class, of its verbs."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        found = CHOICE.search(message)
        near = meant(found["said"], re.findall(r"[\w.-]+", found["known"])) if found else ""
        raise UserError(f"{message}{near}; `{self.prog} --help` says more")

    def unknown(self, word: str) -> NoReturn:
        """Raises UserError for a word that is neither an option nor an override."""
        near = meant(word.split("=")[0], re.findall(r"--[a-z-]+", self.format_help()))
        raise UserError(f"unknown argument {word}{near}; overrides have the form section.key=value")
