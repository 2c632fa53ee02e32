"""A bar of a process that was killed holds up nobody else's."""

import os
import signal

import pytest
from tqdm import tqdm

from nlscale.runtime.progress import progress


@pytest.mark.timeout(60)
def test_a_child_killed_while_it_draws() -> None:
    progress(total=1, disable=True)
    child = os.fork()
    if not child:
        progress(total=1, disable=True)
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with progress(total=1) as bar:
        bar.update()
    assert bar.n == 1
