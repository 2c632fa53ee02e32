"""Progress bars that a killed process cannot hold up."""

import threading
from typing import Any

from tqdm import tqdm


def progress(**options: Any) -> "tqdm[Any]":
    """A bar of tqdm, with a lock of this process alone.

    tqdm's own lock is a semaphore that forks share: a child killed while it draws would keep it for ever, and whoever
    draws next (the launcher's next attempt, a preparation begun again) would wait for the dead.
    """
    tqdm.set_lock(threading.RLock())
    return tqdm(**options)
