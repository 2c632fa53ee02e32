"""One writer a run folder: who holds it, taking it over from the dead, and a fence against those who only looked dead.

`holder.json` names the attempt that may write: its token (one more with each), host, process, and a beat that goes on while
it lives. On the same host a dead process shows at once; another host's is given up when its beat stood still for the lease,
by our own clock. Whoever was replaced finds another token at the next commit and cannot commit.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nlscale.config.errors import StoppedOnPurpose, UserError
from nlscale.runtime.folder import write_durably

BEATS = 6  # of a holder within the lease
PATIENCE = 30.0  # seconds to wait for the guard, which nobody holds for longer than a commit's rename


@dataclass(frozen=True)
class Holder:
    """An attempt, as it stands in the file."""

    token: int
    host: str
    boot: str  # of the host
    pid: int
    born: str  # when the process started, in ticks after boot: process ids come again
    job: str  # Slurm's job id, empty elsewhere
    life: int = 0  # how often Slurm had restarted the job
    beat: int = 0
    released: bool = False

    @property
    def dead(self) -> bool:
        """Whether it is known to be gone, which only its own host can say."""
        here = this_process(self.token)
        if self.released or (self.job and self.job == here.job and self.life < here.life):
            return True
        return self.host == here.host and (self.boot != here.boot or self.born != born(self.pid))

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"attempt {self.token} (host {self.host}, process {self.pid}{job})"


def this_process(token: int) -> Holder:
    """This process as a holder."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pid = os.getpid()
    job, life = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return Holder(token, socket.gethostname(), boot, pid, born(pid), job, life)


def born(pid: int) -> str:
    """When a process of this host started; empty where there is none, or nothing but its exit code."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


class Hold:
    """This attempt's right to write a run folder."""

    def __init__(self, folder: Path, lease: float) -> None:
        """`lease`: seconds without a beat after which another host's attempt is taken for dead."""
        self.file, self.guard, self.lease = folder / "holder.json", folder / ".holder.lock", lease
        self.mine: Holder | None = None
        self.silent = 0.0  # when whoever was replaced has heard of it
        self.ended = threading.Event()

    @property
    def token(self) -> int:
        """Of this attempt; 0 on ranks that hold nothing."""
        return self.mine.token if self.mine else 0

    def take(self) -> str:
        """Takes the folder and gives what there is to say of it; raises UserError naming the holder where one lives."""
        old = self.read()
        if old is not None and not old.dead:
            self.outwait(old)
        with self.guarded():
            now = self.read()
            if now is not None and (old is None or now.token != old.token):
                raise UserError(f"{self.file.parent} was just taken by {now}; wait for it, or give another run.name")
            self.mine = this_process(now.token + 1 if now else 1)
            self.write(self.mine)
        if old is not None and not old.released and old.host != self.mine.host:
            self.silent = time.monotonic() + 1.2 * self.lease / BEATS
        threading.Thread(target=self.live, daemon=True, name="holder").start()
        return "" if old is None or old.released else f"takes the folder over from {old}, which is dead"

    def await_silence(self) -> None:
        """Returns when an attempt of another host, should it live after all, has heard that it is replaced."""
        time.sleep(max(0.0, self.silent - time.monotonic()))

    @property
    def replaced(self) -> bool:
        """Whether a beat found that another attempt has the folder."""
        return self.mine is not None and self.ended.is_set()

    def outwait(self, old: Holder) -> None:
        """Returns when the holder's beat stood still for the lease; raises UserError when it goes on."""
        refused = UserError(
            f"{self.file.parent} is held by {old}, which is alive; wait for it, or give another run.name"
        )
        if old.host == socket.gethostname():
            raise refused
        until = time.monotonic() + self.lease
        while time.monotonic() < until:
            time.sleep(self.lease / 20)
            now = self.read()
            if now is not None and now.released:
                return
            if now is None or (now.token, now.beat) != (old.token, old.beat):
                raise refused

    def live(self) -> None:
        """Beats until released or replaced."""
        while not self.ended.wait(self.lease / BEATS):
            with contextlib.suppress(OSError, StoppedOnPurpose), self.committing() as mine:
                self.mine = replace(mine, beat=mine.beat + 1)
                self.write(self.mine)

    @contextlib.contextmanager
    def committing(self) -> Iterator[Holder]:
        """Within it nobody else can take the folder; raises StoppedOnPurpose where somebody has."""
        with self.guarded():
            now, mine = self.read(), self.mine
            if mine is None or now is None or now.token != mine.token:
                self.ended.set()
                raise StoppedOnPurpose(f"{now} has taken {self.file.parent} over; this attempt writes nothing more")
            yield mine

    def release(self) -> None:
        """Lets the folder go, if it is ours."""
        self.ended.set()
        if self.mine is None:
            return
        with contextlib.suppress(OSError, StoppedOnPurpose), self.committing() as mine:
            self.write(replace(mine, released=True))

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """One process at a time, where the file system has locks; where it has none, the token alone decides."""
        with self.guard.open("a") as file:
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.01)
                except OSError:
                    break
                else:
                    break
            yield

    def read(self) -> Holder | None:
        """Who stands in the file; None where nobody does. Raises OSError where a file system does not say."""
        try:
            return Holder(**json.loads(self.file.read_text()))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None

    def write(self, holder: Holder) -> None:
        """Puts a holder in."""
        write_durably(self.file, json.dumps(asdict(holder)))
