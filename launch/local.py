"""Ranks on one machine: forked after import, watched until the last one ends.

Importing torch and megatron-core costs seconds of CPU a process; a fork inherits them. On a machine with GPUs the parent
must not touch CUDA before it forks, and nothing here does.
"""

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from nlscale.config.errors import ORDERLY
from nlscale.runtime.watch import heeded

GRACE = 10.0  # seconds that the others get after one rank has failed
PATIENCE = 120.0  # seconds that they get after one has ended on purpose: the others end likewise, in their own time
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process hears when its parent ends


def gpus() -> int:
    """NVIDIA GPUs that this process may use, without touching one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    count: int,
    function: Callable[[int], int | None],
    environment: Mapping[str, str] = {},
    logs: str | None = None,
    speak: bool = False,
    timeout: float | None = None,
) -> int:
    """Runs `function(rank)` on `count` forked ranks and gives the first non-zero exit code, else 0.

    What a rank prints goes to `logs/rank-00000.log`; with `speak`, rank 0 keeps this terminal. SIGTERM, SIGINT,
    SIGUSR2 and SIGHUP are passed on, and ranks hear SIGTERM where this process is killed. When one rank fails, the others
    get GRACE seconds, then SIGKILL. They meet at MASTER_PORT, a free port where neither `environment` nor this process names
    one: several runs fit on a machine.
    """
    port = os.environ.get("MASTER_PORT") or str(free_port())
    environment = {"MASTER_PORT": port, **environment}
    children: dict[int, int] = {}
    parent = os.getpid()
    gc.freeze()  # a rank that collects garbage would write to memory that it shares with this process, and so copy it
    for rank in range(count):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            log = None if logs is None or (speak and rank == 0) else os.path.join(logs, f"rank-{rank:05d}.log")
            not_outliving(parent)
            os._exit(child(rank, count, function, environment, log))
        children[pid] = rank
    gc.unfreeze()
    return watch(children, time.monotonic() + timeout if timeout else None, logs)


def not_outliving(parent: int) -> None:
    """Has this rank hear SIGTERM when its parent ends, however it does: it saves what it has, and nobody trains unseen."""
    with contextlib.suppress(OSError, AttributeError):  # Linux's own; elsewhere ranks outlive a launcher that is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def child(
    rank: int, count: int, function: Callable[[int], int | None], environment: Mapping[str, str], log: str | None
) -> int:
    """Life of one forked rank; gives its exit code."""
    atexit._clear()  # the parent's endings are not ours; what this rank registers (shared memory) is run below
    for number in heeded():
        signal.signal(number, signal.SIG_DFL)
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(environment)
    code = 1
    try:
        code = function(rank) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def watch(children: dict[int, int], deadline: float | None, logs: str | None) -> int:
    """Waits for all children; gives the exit code of the first that failed."""

    def forward(number: int, _: object) -> None:
        for pid in list(children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in heeded()}
    failed, codes = 0, dict[int, int]()
    try:
        while children:
            for pid in list(children):
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done:
                    continue
                rank = children.pop(pid)
                code = codes[rank] = os.waitstatus_to_exitcode(status)
                if code and not failed:
                    failed = code if code > 0 else 128 - code
                    orderly = code in ORDERLY
                    deadline = min(deadline or float("inf"), time.monotonic() + (PATIENCE if orderly else GRACE))
                    if not orderly:
                        where = f"; see {logs}/rank-{rank:05d}.log" if logs else ""
                        who = f"rank {rank} (host {socket.gethostname()})"
                        print(f"{who} ended with {code}{where}", file=sys.stderr, flush=True)
            if deadline is not None and time.monotonic() > deadline:
                failed = failed or 124
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed and failed in ORDERLY and codes.get(0) != failed and logs:
        repeat(next(rank for rank, code in codes.items() if code == failed), logs)
    return failed


def repeat(rank: int, logs: str) -> None:
    """The last words of a rank that ended for a reason of its own, which stand in its log only."""
    with contextlib.suppress(OSError, IndexError), open(os.path.join(logs, f"rank-{rank:05d}.log")) as log:
        print(f"rank {rank}: {log.read().splitlines()[-1]}", file=sys.stderr, flush=True)
