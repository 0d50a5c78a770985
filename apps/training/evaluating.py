"""When a run evaluates on its dev split, and what becomes of the number."""

from __future__ import annotations

from collections.abc import Callable

from apps.training.config_schema import TrainConfig
from apps.training.data.loader import TrainLoader, dev_batches
from apps.training.outcome import Outcome
from apps.training.progress import Progress
from apps.training.reporting.lines import evaluation_line
from apps.training.trainer import Trainer


class Evaluator:
    """Evaluates every `training.eval_steps` and after the last step, each worker its share of the dev rows."""

    def __init__(
        self, config: TrainConfig, trainer: Trainer, loader: TrainLoader, should_stop: Callable[[], bool]
    ) -> None:
        self.settings, self.mode = config.training, config.logging.progress
        self.trainer, self.loader, self.should_stop = trainer, loader, should_stop

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after `step`."""
        every = self.settings.eval_steps
        periodic = every is not None and step % every == 0
        return periodic or (self.settings.evaluate and step == self.trainer.last_step)

    def make_up(self, outcome: Outcome, progress: Progress) -> None:
        """Evaluate the final weights where an earlier start took the last step and was stopped before this."""
        step = self.trainer.last_step
        if self.settings.evaluate and outcome.last_step == step and outcome.last_evaluation is None:
            self.evaluate(step, outcome, progress)

    def evaluate(self, step: int, outcome: Outcome, progress: Progress) -> None:
        """Evaluate, unless somebody asks to stop meanwhile; the number goes to `outcome` and the screen."""
        progress.clear()
        loader, batch_size = self.loader, self.settings.batch_size
        batches = -(-loader.dataset.num_dev_rows // (batch_size * loader.world_size))
        with Progress(batches, "Evaluating", "batches", mode=self.mode) as evaluating:
            rows = dev_batches(loader.dataset, batch_size, loader.rank, loader.world_size)
            evaluation = self.trainer.evaluate(rows, step, evaluating.update, should_stop=self.should_stop)
        if evaluation is not None:
            outcome.evaluations.append(evaluation)
            progress.write(evaluation_line(evaluation))
