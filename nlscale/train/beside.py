"""Saving beside training: a copy of what is saved, and the thread that writes it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nlscale.train.pieces import Pieces


class Staging:
    """Host memory for the copy of one save: kept for the next one, which so touches no new pages.

    It never holds more than one save's tensors.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[str, int], Tensor] = {}

    def copies(self, pieces: dict[str, Pieces]) -> dict[str, Pieces]:
        """Pieces that hold what `pieces` hold now; those that another rank writes hold nothing."""
        before, self.held = self.held, {}
        found, sources = {}, []
        for name, each in pieces.items():
            rectangles = []
            for place, (offset, values) in enumerate(each.rectangles if each.owner else []):
                buffer = before.pop((name, place), None)
                if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
                    buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                self.held[name, place] = buffer
                sources.append(values)
                rectangles.append((offset, buffer))
            found[name] = Pieces(each.shape, rectangles, each.owner)
        if sources:
            torch._foreach_copy_(list(self.held.values()), sources, non_blocking=True)
        if any(values.is_cuda for values in sources):
            torch.cuda.current_stream().synchronize()
        return found


class Beside:
    """At most one task in a thread."""

    def __init__(self, device: torch.device) -> None:
        """`device`: of the run, which the task must not wait for."""
        self.device = device
        self.thread: threading.Thread | None = None
        self.given: Any = None
        self.error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the last task ended in an error that nobody has heard of yet."""
        return self.error is not None

    def start(self, task: Callable[[], Any]) -> None:
        """Begins a task; the one before has been settled. What a GPU has been asked to compute for it is waited for."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

        def run() -> None:
            try:
                with self.apart():
                    self.given = task()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True, name="save")
        self.thread.start()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """On a GPU: the run's, where a new thread would take the first, and a stream of its own."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
            yield

    def end(self, seconds: float) -> bool:
        """Whether the task came to its end in so many seconds; its error stays unsaid."""
        if self.thread is not None:
            self.thread.join(seconds)
        return self.thread is None or not self.thread.is_alive()

    def settle(self, waiting: Callable[[], None] = lambda: None) -> Any:
        """Waits for the task, if there is one; gives what it gave or raises its error. `waiting` is called every second."""
        while not self.end(1.0):
            waiting()
        given, error = self.given, self.error
        self.thread, self.given, self.error = None, None, None
        if error is not None:
            raise error
        return given
