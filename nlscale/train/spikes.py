"""Losses that stand out of those before them, told by a robust z-score; and what a run that asks for it does then."""

from statistics import median

from nlscale.config.errors import StoppedOnPurpose
from nlscale.runtime.log import Journal
from nlscale.train.checkpoint import Checkpoints
from nlscale.train.state import TrainState

HEARD, LEAST = 64, 32  # losses that one is held against, and how many of them there must be
NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
FLOOR = 1e-3  # of the median: deviations below it are no measure
AGAIN = 3  # times that a run goes back to the same checkpoint


def z_score(loss: float, before: list[float]) -> float:
    """Robust standard deviations of a loss above the median of those before; 0 while there are too few."""
    if len(before) < LEAST:
        return 0.0
    middle = median(before)
    spread = NORMAL * median(abs(each - middle) for each in before)
    return (loss - middle) / max(spread, FLOOR * abs(middle))


class Spikes:
    """Watches a run's losses, which are equal on all ranks."""

    def __init__(self, state: TrainState, checkpoints: Checkpoints, journal: Journal) -> None:
        self.state, self.checkpoints, self.journal = state, checkpoints, journal
        self.returns: dict[int, int] = {}

    def heard(self, loss: float) -> bool:
        """Takes a step's loss; writes a spike to events. True where the run went back to a checkpoint: a collective then.

        The rows read since that checkpoint are passed over. Raises StoppedOnPurpose where going back does not help.
        """
        state, asked = self.state, self.state.run.train
        score = z_score(loss, state.losses)
        state.losses = [*state.losses, loss][-HEARD:]
        if not asked.spike or score <= asked.spike:
            return False
        self.journal.event("spike", state.step, loss=loss, z=round(score, 1))
        self.journal.say(f"step {state.step}: the loss {loss:.4f} stands {score:.0f} deviations above those before")
        return asked.on_spike == "rollback" and self.back()

    def back(self) -> bool:
        """Goes back to the newest good checkpoint before this step."""
        state, reached = self.state, self.state.step
        there = self.checkpoints.roll_back(state)
        if there is None:
            self.journal.event("no rollback", reached, reason="no good checkpoint of these levels and data")
            return False
        self.journal.event(
            "rollback", there, reached=reached, rows_passed_over=state.run.train.global_batch * (reached - there)
        )
        self.journal.say(f"goes back to step {there}, and passes over the rows of steps {there + 1} to {reached}")
        self.returns[there] = self.returns.get(there, 0) + 1
        if self.returns[there] == AGAIN:
            raise StoppedOnPurpose(f"the loss rose {AGAIN} times after the checkpoint of step {there}; lower optim.lr")
        return True
