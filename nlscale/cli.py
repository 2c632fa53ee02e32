"""nlscale: the program. A user's mistake is one line on stderr and exit code 78."""

import os
import re
import sys
from collections.abc import Sequence

from nlscale.config.errors import CODES, FINISHED, code_of, require
from nlscale.verbs import abroad, datasets, jobs, planning, reading, saved, training
from nlscale.verbs.common import writable
from nlscale.verbs.parser import Parser

INTERRUPTED, UNHEARD = 130, 141  # as the shell has it of what ends by SIGINT and SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; gives the exit code."""
    try:
        for word in sys.argv[1:] if arguments is None else arguments:
            require(not re.search("[\ud800-\udfff]", word), f"{ascii(word)} is no UTF-8")
        options, overrides = build_parser().parse_known_args(arguments)
        unknown = [word for word in overrides if "=" not in word]
        if unknown or (overrides and not hasattr(options, "recipe")):
            options.parser.unknown((unknown or overrides)[0])
        options.overrides = overrides
        writable(getattr(options, "json", None))
        return int(options.verb(options) or FINISHED)
    except tuple(CODES) as error:
        print(f"nlscale: {error}", file=sys.stderr)
        return code_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read what is said, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # and the interpreter still has lines to flush
        return UNHEARD


def build_parser() -> Parser:
    """Every verb and its options."""
    parser = Parser(prog="nlscale", description="Pretraining of continuum-memory Transformers.")
    parent = parser.add_subparsers(required=True, metavar="VERB")
    for room in (training, planning, datasets, jobs, reading, abroad, saved):
        room.verbs(parent)
    return parser


if __name__ == "__main__":
    sys.exit(main())
