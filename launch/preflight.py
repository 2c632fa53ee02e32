"""Every node proves itself before ranks start: one task a node, seconds, no torch. A bad node is named.

The first node listens; every other one connects to it, compares clocks and hands its facts in. The first one judges: its
exit code is 69 where a node has too few or too small GPUs, too little disk, a clock that is off, other versions than most,
or never came. What ranks compute and send is proved when they have joined (nlscale/runtime/muster.py).
"""

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from nlscale_launch import slurm
from nlscale_launch.attempt import PROOF, Submission, cancelled, nodes_of_job
from nlscale_launch.policy import BAD_NODE

from nlscale.config.errors import SAVED_ON_SIGNAL
from nlscale.runtime.folder import Folder, write_durably

PACKAGES = ("nlscale", "torch", "megatron-core", "deepspeed", "triton", "mosaicml-streaming")
PINGS = 5  # of which the quickest compares clocks
WRITTEN = 2**23  # bytes that a disk is tried with
LONGEST = 2**16  # bytes of a message


def node_facts(submission: Submission) -> dict[str, Any]:
    """What this node is and can do."""
    places = {"the run folder": submission.folder, "scratch": submission.scratch or os.environ.get("TMPDIR", "/tmp")}
    return {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "gpus": gpu_memories() if submission.gpus else [],
        "disks": {name: disk(Path(path)) for name, path in places.items()},
        "versions": versions(),
    }


def gpu_memories() -> list[float]:
    """GiB of every GPU that the driver answers for."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [float(word) / 1024 for word in done.stdout.split() if word.replace(".", "").isdigit()]


def disk(path: Path) -> dict[str, Any]:
    """GiB free, and MiB a second of a write that reaches the disk; or what stands in the way."""
    trial = path / f".preflight.{os.uname().nodename}.{os.getpid()}"
    try:
        there = os.statvfs(path)
        began = time.monotonic()
        with trial.open("wb") as file:
            file.write(bytes(WRITTEN))
            file.flush()
            os.fsync(file.fileno())
        taken = time.monotonic() - began
    except OSError as error:
        return {"path": str(path), "error": error.strerror or str(error)}
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
    return {"path": str(path), "free": there.f_bavail * there.f_frsize / 2**30, "speed": WRITTEN / 2**20 / taken}


def versions() -> dict[str, str]:
    """Of everything that must be the same on all nodes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    driver = Path("/sys/module/nvidia/version")
    if driver.is_file():
        found["driver"] = driver.read_text().strip()
    return found


def faults(facts: dict[str, Any], submission: Submission, usual: dict[str, str]) -> list[str]:
    """What is wrong with a node; `usual`: the versions that most have."""
    found = []
    gpus = facts["gpus"]
    if len(gpus) < submission.gpus:
        found.append(f"{len(gpus)} of {submission.gpus} GPUs answer")
    if gpus and min(gpus) < submission.least_gpu_memory:
        found.append(f"a GPU has {min(gpus):.0f} GiB, {submission.least_gpu_memory:.1f} are asked for")
    for name, measured in facts["disks"].items():
        if "error" in measured:
            found.append(f"{name} ({measured['path']}): {measured['error']}")
        elif measured["free"] < submission.least_free:
            found.append(
                f"{name} ({measured['path']}) has {measured['free']:.2f} GiB free of {submission.least_free:g}"
            )
        elif measured["speed"] < submission.least_write:
            where = f"{name} ({measured['path']})"
            found.append(f"{where} takes {measured['speed']:.2f} MiB/s, {submission.least_write:g} are asked for")
    if abs(facts.get("skew", 0.0)) > submission.skew:
        found.append(f"its clock is {facts['skew']:+.1f} s off the others'")
    for name in sorted(usual.keys() | facts["versions"].keys()):
        mine, others = facts["versions"].get(name, "none"), usual.get(name, "none")
        if mine != others:
            found.append(f"{name} {mine}, elsewhere {others}")
    return found


class Judge:
    """The first node: gathers the facts of all."""

    def __init__(self, port: int, token: str) -> None:
        """Listens; raises OSError where the port is taken."""
        self.token, self.gathered, self.lock = token, dict[str, dict[str, Any]](), threading.Lock()
        self.server = socket.create_server(("", port), backlog=1024, reuse_port=False)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        """Accepts until the server is closed."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.server.accept()
                threading.Thread(target=self.hear, args=(connection,), daemon=True).start()

    def hear(self, connection: socket.socket) -> None:
        """One node: pings are answered with this host's time, facts are kept."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), connection:
            connection.settimeout(60)
            for message in lines(connection):
                if message["token"] != self.token:
                    return
                if "facts" in message:
                    with self.lock:
                        self.gathered[str(message["facts"]["node"])] = message["facts"]
                send(connection, {"time": time.time()})

    def wait(self, nodes: list[str], seconds: float) -> dict[str, dict[str, Any]]:
        """Facts of those that came in time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with self.lock:
                if set(nodes) <= self.gathered.keys():
                    break
            time.sleep(0.02)
        self.server.close()
        with self.lock:
            return dict(self.gathered)


def judged(gathered: dict[str, dict[str, Any]], nodes: list[str], submission: Submission) -> dict[str, list[str]]:
    """Bad nodes and what is wrong with them."""
    unheard = [node for node in nodes if node not in gathered]
    if len(unheard) > len(nodes) / 2:  # of most: then it is the first node that does not hear
        return {nodes[0]: [f"{len(unheard)} of {len(nodes)} nodes were not heard of within {submission.gather:g} s"]}
    clocks = [facts.get("skew", 0.0) for facts in gathered.values()]
    if (
        sum(abs(clock) > submission.skew for clock in clocks) > len(clocks) / 2
    ):  # then it is the first one's that is off
        middle = median(clocks)
        gathered = {node: facts | {"skew": facts.get("skew", 0.0) - middle} for node, facts in gathered.items()}
    kinds = Counter(json.dumps(facts["versions"], sort_keys=True) for facts in gathered.values())
    usual = json.loads(kinds.most_common(1)[0][0]) if kinds else {}
    bad = {node: faults(facts, submission, usual) for node, facts in gathered.items()}
    bad |= {node: [f"was not heard of within {submission.gather:g} s"] for node in unheard}
    return {node: said for node, said in bad.items() if said}


def hand_in(facts: dict[str, Any], host: str, port: int, token: str, seconds: float) -> None:
    """Compares clocks with the first node and gives it this one's facts; raises OSError where it does not answer."""
    with connected(host, port, seconds) as connection:
        answers, pings = lines(connection), list[tuple[float, float]]()
        for _ in range(PINGS):
            began, sent = time.monotonic(), time.time()
            send(connection, {"token": token})
            theirs = next(answers)["time"]
            taken = time.monotonic() - began
            pings.append((taken, sent + taken / 2 - theirs))
        send(connection, {"token": token, "facts": facts | {"skew": min(pings)[1]}})
        next(answers)


def connected(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to the first node, which may still be starting."""
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=10)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """One line of JSON."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Messages until the other side closes; one that is too long ends it."""
    with connection.makefile("rb") as file:
        while (line := file.readline(LONGEST)).endswith(b"\n"):
            yield json.loads(line)


def main(path: str) -> int:
    """This node's part; on the first one the verdict, as an exit code."""
    submission, environment = Submission.read(path), os.environ
    port, token = int(environment["MASTER_PORT"]), environment["NLSCALE_TOKEN"]
    if environment.get("SLURM_NODEID", "0") != "0":
        try:
            hand_in(node_facts(submission), environment["MASTER_ADDR"], port, token, submission.gather)
        except (OSError, StopIteration) as error:
            print(f"{socket.gethostname()} cannot reach {environment['MASTER_ADDR']}: {error}", file=sys.stderr)
        return 0  # the first node's word decides
    judge, mine = Judge(port, token), node_facts(submission)
    judge.gathered[mine["node"]] = mine
    nodes = nodes_of_job() or [mine["node"]]
    gathered = judge.wait(nodes, submission.gather)
    bad = judged(gathered, nodes, submission)
    write_durably(Path(environment["NLSCALE_LOGS"]) / PROOF, json.dumps({"nodes": gathered, "bad": bad}, indent=1))
    for node, said in sorted(bad.items()):
        print(f"{node}: {', '.join(said)}", file=sys.stderr)
    if not bad and cancelled(Folder(Path(submission.folder)), slurm.this_job()):
        return SAVED_ON_SIGNAL  # said while no rank was there to hear it
    return BAD_NODE if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
