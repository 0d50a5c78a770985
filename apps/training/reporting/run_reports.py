"""Everything that is told of each step beside the screen: per_step_metrics.csv and the loggers of `logging.report_to`.

Worker 0 alone has it.
"""

from __future__ import annotations

import secrets
import sys
from functools import partial
from pathlib import Path
from types import TracebackType

from apps.training import loggers
from apps.training.config import to_mapping
from apps.training.config_schema import TrainConfig
from apps.training.files import atomic_path
from apps.training.outcome import Outcome
from apps.training.progress import Progress
from apps.training.reporting.channel import Channel
from apps.training.reporting.output_folder import METRICS, MetricsFile
from apps.training.reporting.pace import Pace, Report
from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.trainer import Trainer

RUN_ID = "run_id.txt"  # in the output folder: a resumed run goes on where the loggers know it


class RunReports:
    """Follows `outcome`, which holds the steps before those to come. A context manager that closes what it opened."""

    def __init__(self, config: TrainConfig, outcome: Outcome, trainer: Trainer) -> None:
        self.outcome, self.statistics, self.workers = outcome, trainer.statistics, trainer.workers
        self.rows_per_step = config.training.batch_size * trainer.accumulation * trainer.workers.world_size
        self.tokens = sum(record.num_tokens for record in outcome.steps)
        self._evaluations = len(outcome.evaluations)
        folder, settings = Path(config.training.output_dir), config.logging
        self.metrics = MetricsFile(folder / METRICS, outcome.steps)
        self.pace = Pace(settings.records_per_second)
        self.channels: list[Channel] = []
        names = dict.fromkeys(settings.report_to or (["csv"] if self.statistics else []))
        if names:
            run = _run_of(config, folder, outcome.last_step)
            self.channels = [Channel(name, partial(loggers.load(name), run)) for name in names]

    def append(self, record: StepRecord, progress: Progress) -> None:
        """The numbers of a step, which `outcome` has too; what file and loggers complain about goes to stderr."""
        self.metrics.append(record)
        self.tokens += record.num_tokens
        self._tell_evaluations()
        values = step_values(record, self.tokens, self.rows_per_step)
        values |= self.outcome.efficiency.shares(record.seconds) if record.seconds > 0 else {}
        measured = self.statistics.values_of(record.step) if self.statistics else {}
        self._offer(Report(record.step, values | measured, importance=int(bool(measured))))
        for complaint in self._complaints():
            progress.write(complaint, stream=sys.stderr)

    def __enter__(self) -> RunReports:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.metrics.close()
        self._tell_evaluations()
        for report in self.pace.last() if self.channels else []:
            self._send(report)
        with self.workers.busy("closing the loggers"):
            for channel in self.channels:
                channel.close(failed=kind is not None)
        for complaint in self._complaints():
            print(complaint, file=sys.stderr, flush=True)
        if self.pace.left_out:
            print(
                f"{self.pace.left_out} records were left out of {', '.join(each.name for each in self.channels)}: "
                f"logging.records_per_second={1 / self.pace.interval:g}"
            )

    def _tell_evaluations(self) -> None:
        for evaluation in self.outcome.evaluations[self._evaluations :]:
            self._offer(Report(evaluation.step, evaluation_values(evaluation), importance=2))
        self._evaluations = len(self.outcome.evaluations)

    def _offer(self, report: Report) -> None:
        for each in self.pace.offer(report) if self.channels else []:
            self._send(each)

    def _send(self, report: Report) -> None:
        for channel in self.channels:
            channel.send(report)

    def _complaints(self) -> list[str]:
        told = (self.metrics.complaint(), *(channel.complaint() for channel in self.channels))
        return [complaint for complaint in told if complaint is not None]


def step_values(record: StepRecord, tokens: int, rows_per_step: int) -> dict[str, float]:
    """What the loggers are told of a step; `tokens` are those of all steps so far."""
    values: dict[str, float] = {
        "loss": record.loss,
        "lr": record.lr,
        "epoch": record.epoch,
        "tokens": tokens,
        "seconds": record.seconds,
        "tokens_per_second": record.tokens_per_second,
    }
    if record.seconds > 0:
        values |= {"steps_per_second": 1 / record.seconds, "samples_per_second": rows_per_step / record.seconds}
    optional = {"grad_norm": record.grad_norm, "objective": record.objective, "skipped": record.skipped or None}
    return values | {name: value for name, value in optional.items() if value is not None}


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    """What the loggers are told of an evaluation."""
    return {"evaluation_loss": evaluation.loss, "perplexity": evaluation.perplexity}


def _run_of(config: TrainConfig, folder: Path, resumed_step: int) -> loggers.Run:
    settings, file = config.logging, folder / RUN_ID
    run_id = settings.run_id
    if run_id is None:
        known = file.read_text(encoding="utf-8").strip() if resumed_step and file.exists() else ""
        run_id = known or secrets.token_hex(4)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_text(run_id + "\n", encoding="utf-8")
    return loggers.Run(
        project=settings.project,
        name=settings.name or folder.resolve().name,
        run_id=run_id,
        tags=tuple(settings.tags),
        offline=settings.offline,
        folder=folder,
        settings=to_mapping(config),
        resumed_step=resumed_step,
    )
