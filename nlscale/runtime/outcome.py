"""How an attempt ended, said by the rank that ended first: exit.json in the attempt's logs.

A launcher learns one exit code of all ranks, those included that it ended itself; the first rank knows the reason.
"""

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from nlscale.config.errors import BadHosts
from nlscale.runtime.folder import read_json

EXIT = "exit.json"
HARDWARE = (
    "uncorrectable",
    "hardware error",
    "fell off the bus",
    "GPU is lost",
    "Xid",
    "devices unavailable",
    "device(s) is/are busy or unavailable",
    "unknown error",
)
LOGS = "NLSCALE_LOGS"  # variable of every rank whose launcher has opened an attempt's log folder


def here() -> str:
    """This host, as Slurm calls it where it has started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def blamed(error: Exception) -> list[str]:
    """Hosts that an error is about: those that it names, or this one where its device failed; of most errors none.

    CUDA's errors are a program's, too (an assertion, memory that ran out): only those count that name the hardware.
    """
    if isinstance(error, BadHosts):
        return list(error.hosts)
    return [here()] if any(word in str(error) for word in HARDWARE) else []


def tell(code: int, rank: int, message: str, hosts: Sequence[str] = ()) -> None:
    """Writes the reason, unless a rank has. `hosts`: what it broke on.

    Without a launcher's log folder there is nobody to tell.
    """
    logs = os.environ.get(LOGS)
    if not logs:
        return
    with contextlib.suppress(OSError), open(os.path.join(logs, EXIT), "x") as file:
        json.dump({"code": code, "rank": rank, "host": here(), "message": message, "hosts": list(hosts)}, file)


def told(logs: Path) -> dict:
    """What was written; empty where nothing was."""
    return read_json(logs / EXIT)
