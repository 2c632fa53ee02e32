"""What a run reports: metrics.jsonl, a progress bar or plain lines, wandb. Only rank 0 writes."""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from nlscale.config.read import plain
from nlscale.model.count import flops_a_token
from nlscale.model.hope import Hope
from nlscale.optim.schedule import rate
from nlscale.runtime.folder import Folder, read_lines
from nlscale.runtime.goodput import Steps, account, lost, of_lines
from nlscale.runtime.holder import Hold
from nlscale.runtime.log import Journal, Lines
from nlscale.runtime.progress import progress
from nlscale.runtime.watch import sparing_children
from nlscale.train.alignment import Alignment
from nlscale.train.peak import peak_bytes
from nlscale.train.state import TrainState
from nlscale.train.step import Report
from nlscale.train.surprise import Surprise

WAITS = ("gather", "schedule", "reduce")  # parts of a step that are there for other ranks
REACHED = 30  # seconds in which wandb must answer


class Metrics:
    """A context that turns each step's report into records."""

    def __init__(
        self,
        state: TrainState,
        folder: Folder,
        journal: Journal,
        peak: float,
        hold: Hold,
        chunks: Sequence[Hope] = (),
    ) -> None:
        """`chunks`: of the model, on this rank."""
        run = state.run
        self.surprise = Surprise(chunks, run.model.layers, state.world) if run.log.surprise else None
        self.state, self.folder, self.journal = state, folder, journal
        self.flops_a_token = flops_a_token(state.run.model, state.run.levels, state.run.data.sequence)
        self.peak, self.hold = peak, hold
        self.levels = [level.name for level in state.run.levels]
        compared = state.run.levels if state.run.log.alignment else []
        self.alignment = Alignment(compared, state.leaves, state.world)

    def __enter__(self) -> "Metrics":
        run, leads = self.state.run, self.state.world.leads
        if self.alignment.pairs:
            self.state.optimizer.arrive()
            self.alignment.begin(self.state.step)
        self.lines = Lines(self.folder.metrics) if leads else None
        self.forget()  # what a crashed start had computed, and this one computes again
        self.steps = of_lines(read_lines(self.folder.metrics)) if leads else Steps()
        tty = sys.stderr.isatty()
        self.bar = progress(total=run.train.steps, initial=self.state.step, disable=not (leads and tty), unit="step")
        self.plain = leads and not tty
        self.wandb: Any = self._open_wandb() if leads and run.log.wandb != "disabled" else None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        if self.wandb:
            self.told(lambda: self.wandb.finish(exit_code=0 if error is None else 1))

    def record(self, report: Report) -> dict[str, Any]:
        """Writes one step's line and gives it; where all rows are void, or no loss is finite, it has no loss."""
        state, run = self.state, self.state.run
        if not report.tokens:
            void: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "data/token_hash": 0, "data/void": 1}
            self.write(void)
            self.bar.update()
            return void
        speed = report.tokens / report.seconds
        line: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            **({"train/loss": report.loss} if math.isfinite(report.loss) else {}),
            "optim/grad_norm": sum(norm**2 for norm in report.grad_norm.values()) ** 0.5,
            "optim/lr": rate(run.optim, state.step, run.train.steps),
            "comm/bytes": 0,
            "throughput/tokens_per_second": speed,
            "throughput/step_seconds": report.seconds,
            "throughput/data_wait_seconds": report.data_wait,
            "throughput/mfu": self.flops_a_token * speed / self.peak,
            "memory/peak_bytes": peak_bytes(),
            "data/token_hash": report.token_hash,
        }
        if report.replay_loss is not None:
            line["train/replay_loss"] = report.replay_loss
        line |= {f"time/{name}_seconds": round(seconds, 6) for name, seconds in report.parts.items()}
        waits = sum(report.parts.get(name, 0.0) for name in WAITS) if state.world.size > 1 else 0.0
        line["comm/exposed_seconds"] = round(waits, 6)
        spent = sum(report.parts.values()) + report.data_wait
        line["time/other_seconds"] = round(max(0.0, report.seconds - spent), 6)
        for name, sent in state.optimizer.bytes_sent(report.groups).items():
            fired = name in report.grad_norm
            line[f"optim/level/{name}/fired"] = int(fired)
            line[f"comm/level/{name}/bytes"] = sent
            line["comm/bytes"] += sent
            if name in report.skipped:
                line[f"optim/level/{name}/skipped"] = 1
            if fired:
                line[f"optim/level/{name}/update_norm"] = report.update_norm[name]
                line[f"optim/level/{name}/grad_norm"] = report.grad_norm[name]
        line |= self.surprise.taken() if self.surprise else {}
        self.write(line)
        self.show(line)
        self.compare_moves()
        return line

    def compare_moves(self) -> None:
        """Writes the cosines of the pairs of levels of which the slower one's period has ended. A collective."""
        state = self.state
        if not self.alignment.due(state.step):
            return
        state.optimizer.arrive()  # what the last move gathers
        found = {f"optim/level/{name}/alignment": value for name, value in self.alignment.after(state.step).items()}
        if found:
            self.write({"step": state.step, "tokens": state.tokens, **found})

    def evaluated(self, loss: float, seconds: float) -> None:
        """Writes a held-out loss, and how long it took."""
        where = {"step": self.state.step, "tokens": self.state.tokens}
        found = {"eval/loss": loss} if math.isfinite(loss) else {}
        self.write({**where, **found, "eval/seconds": round(seconds, 3)})
        if self.plain:
            self.journal.say(f"step {self.state.step:6d}  held-out loss {loss:.4f}")
        self.bar.set_postfix_str(f"held-out {loss:.3f}")

    def ledger(self) -> None:
        """Writes where the time has gone so far, over all attempts."""
        if self.lines and (found := account(self.steps, read_lines(self.folder.events), time.time())):
            self.write(
                {"step": self.state.step, "tokens": self.state.tokens, "goodput/share": found.share} | found.values()
            )

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same keys to wandb; nothing where another attempt writes them."""
        if self.hold.replaced:
            return
        self.steps.add(line)
        if self.lines:
            self.lines.write(line)
        if self.wandb:
            self.told(lambda: self.wandb.log(line, step=line["step"]))  # an attempt goes on where the one before was

    def told(self, action: Callable[[], Any]) -> None:
        """Does something with wandb; whatever fails there ends its part in this run, and nothing else."""
        try:
            action()
        except Exception as error:
            self.wandb = None
            self.journal.event("wandb failed", self.state.step, reason=f"{type(error).__name__}: {error}")

    def rolled_back(self) -> None:
        """The run stands at an earlier step: what was written of later ones is dropped."""
        self.forget()
        self.steps = of_lines(read_lines(self.folder.metrics)) if self.lines else Steps()
        self.bar.n = self.state.step

    def forget(self) -> None:
        """Drops lines of steps that are still to come."""
        try:
            dropped = self.lines.forget(self.state.step) if self.lines else []
            steps = [line for line in dropped if "throughput/step_seconds" in line]
            if steps:
                self.journal.event("again", self.state.step, steps=len(steps), seconds=round(lost(steps), 3))
        except OSError as error:
            self.journal.event("metrics failed", self.state.step, reason=str(error))

    def show(self, line: dict[str, Any]) -> None:
        """The bar, or a line where there is no terminal."""
        loss = line.get("train/loss", math.nan)
        self.bar.set_description_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update()
        run, step = self.state.run, line["step"]
        if self.plain and (step % run.log.interval == 0 or step in (1, run.train.steps)):
            moved = [name for name in self.levels if line[f"optim/level/{name}/fired"]]
            self.journal.say(
                f"step {step:6d}/{run.train.steps}  loss {loss:.4f}  "
                f"{line['throughput/tokens_per_second']:,.0f} tokens/s  mfu {line['throughput/mfu']:.1%}  "
                f"moved {' '.join(moved)}"
            )

    def _open_wandb(self) -> Any:
        """A wandb run that goes on as the same curve after a resume; where wandb cannot be reached, one to be sent later."""
        state, mode = self.state, self.state.run.log.wandb
        os.environ.setdefault("WANDB_SILENT", "true")
        for way in dict.fromkeys((mode, "offline")):
            try:
                with sparing_children():
                    opened = self._opened(way)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                self.journal.event("wandb failed", state.step, mode=way, reason=reason)
                then = "offline, `wandb sync` sends it later" if way == "online" else "metrics.jsonl has everything"
                self.journal.say(f"wandb is not available ({reason}); {then}")
            else:
                state.wandb_id = opened.id
                for axis in ("step", "tokens"):
                    opened.define_metric(axis)
                opened.define_metric("*", step_metric="step")
                return opened
        return None

    def _opened(self, mode: Any) -> Any:
        """A wandb run in this mode."""
        import wandb  # which no other rank needs

        state, run = self.state, self.state.run
        return wandb.init(
            project=run.log.project,
            name=run.run.name,
            id=state.wandb_id or None,
            resume="allow",
            mode=mode,
            dir=str(self.folder.path),
            config=plain(run),
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, init_timeout=REACHED, finish_timeout=REACHED
            ),
        )
