"""The work of a sweep: compile each artifact once, then run the trials one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from apps.sweeping.pace import Pace, share_of_run
from apps.sweeping.planning import artifacts_to_compile
from apps.sweeping.running import LastError, Runner, train_words
from apps.sweeping.trials import Trial
from apps.training.cli import INTERRUPTED
from apps.training.progress import Progress, clock_time

LOGS = "logs"


class Sweep:
    """Everything that needs doing for `trials`, until it is done or `stop` is true."""

    def __init__(
        self,
        trials: Sequence[Trial],
        output: Path,
        *,
        runner: Runner,
        launcher: str | None,
        stop: Callable[[], bool],
        stop_on_error: bool = False,
        progress: Literal["auto", "on", "off"] = "auto",
        after_each: Callable[[], None] = lambda: None,
    ) -> None:
        self.trials, self.logs, self.runner, self.launcher = trials, output / LOGS, runner, launcher
        self.stop, self.stop_on_error, self.mode, self.after_each = stop, stop_on_error, progress, after_each

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be started."""
        return self.stop() or (self.stop_on_error and any(trial.status == "failed" for trial in self.trials))

    def compile_all(self) -> None:
        """Each artifact that is missing, once; when that fails, so have all trials that need it."""
        missing = artifacts_to_compile(self.trials)
        for number, (name, waiting) in enumerate(missing.items(), start=1):
            if self.is_over:
                return
            print(f"Compiling {number}/{len(missing)}: {waiting[0].point.name}, for {len(waiting)} runs", flush=True)
            said = LastError()
            code = self.runner(
                train_words("compile", waiting[0].arguments),
                self.logs / f"compile-{Path(name).name}.log",
                on_line=said.see,
                stop=self.stop,
            )
            for trial in waiting if code not in (0, INTERRUPTED) else ():
                trial.status, trial.error = "failed", f"compiling: {said.line(code)}"
            if code not in (0, INTERRUPTED):
                print(f"failed: {waiting[0].error}", flush=True)
                self.after_each()

    def run_all(self) -> None:
        """The trials that wait, in their order."""
        waiting = [trial for trial in self.trials if trial.status == "waiting"]
        pace = Pace([trial.planned.work if trial.planned else 1.0 for trial in waiting])
        done = sum(trial.status == "done" for trial in self.trials)
        with Progress(None, "Sweep", "runs done", mode=self.mode) as progress:
            progress.update(done, of=len(self.trials))
            for number, trial in enumerate(waiting):
                if self.is_over:
                    return
                progress.write(f"Run {number + 1}/{len(waiting)}: {trial.point.name}")
                pace.begin(number)
                self._run(trial, pace, progress)
                pace.end()
                progress.update(int(trial.status == "done"))
                progress.write(outcome_line(trial))
                self.after_each()
            progress.fields = {"of": len(self.trials)}  # nothing is running: the last word says no more

    def _run(self, trial: Trial, pace: Pace, progress: Progress) -> None:
        said = LastError()

        def on_line(line: str) -> None:
            said.see(line)
            step = share_of_run(line)
            if step is not None:
                share, loss = step
                pace.at(share)
                left = pace.remaining()
                fields = {"now": trial.point.name, "at": f"{share:.0%}", "loss": loss}
                progress.update(0, **fields, ETA="–:––" if left is None else clock_time(left))

        words = train_words("run", trial.arguments, self.launcher)
        code = self.runner(words, self.logs / f"{trial.point.name}.log", on_line=on_line, stop=self.stop)
        trial.look()
        if code == INTERRUPTED and trial.status != "done":
            trial.status = "stopped"
        elif code not in (0, INTERRUPTED):
            trial.status, trial.error = "failed", said.line(code)
        elif code == 0:
            trial.status = "done"


def outcome_line(trial: Trial) -> str:
    """What is said of a run that has just ended."""
    if trial.status == "failed":
        return f"  failed: {trial.error}"
    if trial.result is None or trial.status != "done":
        return f"  {trial.status}"
    dev = "" if trial.result.dev_loss is None else f", dev loss {trial.result.dev_loss:.4f}"
    return f"  done: train loss {trial.result.train_loss:.4f}{dev}"
