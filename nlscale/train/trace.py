"""A profiler's trace on demand: of the steps that `log.trace` names, or of the next step once RUN/trace is there."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nlscale.config.run import Run
from nlscale.runtime.folder import Folder
from nlscale.runtime.log import Journal
from nlscale.runtime.world import World
from nlscale.train.state import TrainState

REQUEST = "trace"  # a file in the run folder; it is gone when the trace is there


class Tracer:
    """Traces steps of this rank, in Chrome's format (https://ui.perfetto.dev opens it)."""

    def __init__(self, run: Run, world: World, folder: Folder, journal: Journal) -> None:
        self.steps, self.world, self.folder, self.journal = set(run.log.trace), world, folder, journal

    @property
    def request(self) -> Path:
        """What asks for a trace of the next step."""
        return self.folder.path / REQUEST

    @contextlib.contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        """Traces the step that comes, if anybody asked.

        A collective that a profiler saw begin must not end after it: gloo's thread would write into a closed trace.
        """
        number = state.step + 1
        asked = self.world.leads and self.request.exists()
        if not asked and number not in self.steps:
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profile(activities=activities, record_shapes=True) as seen:
            yield
            state.optimizer.arrive()
        attempts = self.folder.attempts()
        target = (
            attempts[-1] if attempts else self.folder.path
        ) / f"trace-{number:08d}-rank-{self.world.rank:05d}.json.gz"
        try:
            if asked:
                self.request.unlink(missing_ok=True)  # first: where a disk refuses the trace, it is not asked for again
            seen.export_chrome_trace(str(target))
        except OSError as error:
            self.journal.event("trace failed", number, reason=str(error))
            return
        self.journal.event("trace", number, file=str(target.relative_to(self.folder.path)))
