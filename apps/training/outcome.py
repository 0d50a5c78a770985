"""What a run leaves: checkpoint, summary, picture and report page."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from apps.training.checkpointing.static_files import static_files
from apps.training.config import to_yaml
from apps.training.config_schema import TrainConfig
from apps.training.data.storage import Dataset
from apps.training.files import atomic_path
from apps.training.lora import save_trained
from apps.training.reporting import page
from apps.training.reporting.lines import short, unigram_line
from apps.training.reporting.loss_plot import write_loss_plot
from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.reporting.summary import headline, loss_lines, summary_text
from apps.training.reporting.throughput import Efficiency
from apps.training.sampling import sample_text

RECENT = 16  # steps that the progress line's pace is taken of


@dataclass
class Outcome:
    """The numbers of a run, as they come in."""

    title: str
    overview: str
    routed_table: str
    num_parameters: int
    efficiency: Efficiency
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)  # of the statistics, up to the last step

    @property
    def efficiency_line(self) -> str | None:
        """FLOP/s, MFU and floor by the median step; the first ones load kernels. None before the first."""
        return self.efficiency.line(self._median_seconds) if self.steps else None

    @property
    def facts(self) -> dict[str, str]:
        """MFU and floor, where they are known, for the report's tiles."""
        return self.efficiency.fields(self._median_seconds) if self.steps else {}

    @property
    def live_fields(self) -> dict[str, str]:
        """What the progress line shows beside the ETA: the last step's loss and rate, and the pace of the last few.

        One step alone tells no pace: its loss is read late, and behind a checkpoint its time is its neighbour's.
        """
        last, recent = self.steps[-1], self.steps[-RECENT:]
        pace = short(median(record.tokens_per_second for record in recent))
        fields = {"loss": f"{last.loss:.4f}", "lr": f"{last.lr:.3g}", "tokens/s": pace}
        return fields | self.efficiency.fields(median(record.seconds for record in recent))

    @property
    def _median_seconds(self) -> float:
        return median(record.seconds for record in self.steps)

    @property
    def last_step(self) -> int:
        """The last update that was recorded; 0 before the first."""
        return self.steps[-1].step if self.steps else 0

    @property
    def last_evaluation(self) -> Evaluation | None:
        """The evaluation of the final weights, if they were evaluated."""
        at_the_end = self.evaluations and self.steps and self.evaluations[-1].step == self.steps[-1].step
        return self.evaluations[-1] if at_the_end else None


def save_outcome(
    output: Path, outcome: Outcome, model: Any, dataset: Dataset, config: TrainConfig, *, sample: bool
) -> None:
    """Write everything into `output`, the checkpoint first, and say where it lies. `sample`: a text of its own too."""
    save_trained(model, output, dataset.tokenizer_folder, config)

    for line in loss_lines(outcome.steps):
        print(line)
    if outcome.efficiency_line is not None:
        print(outcome.efficiency_line)
    entropy = dataset.dev_unigram_cross_entropy or dataset.unigram_entropy
    if entropy is not None:
        print(unigram_line(entropy))
    text = None
    if sample and dataset.tokenizer_folder is not None:
        text = sample_text(
            model,
            dataset.tokenizer_folder,
            prompt=config.logging.sample_prompt,
            rows=dataset.dev or dataset.train,
            seed=config.training.seed,
        )
    parameters = json.loads(static_files(model, dataset.tokenizer_folder)["config.json"])
    summary = summary_text(
        outcome.overview,
        outcome.steps,
        outcome.last_evaluation,
        entropy,
        outcome.routed_table,
        parameters,
        efficiency=outcome.efficiency_line,
    )
    _write(output / "summary.txt", summary)
    print(f"Summary saved at {output}/summary.txt")
    print(f"Metrics saved at {output}/per_step_metrics.csv")

    write_loss_plot(
        output / "loss.png", outcome.steps, outcome.evaluations, title=outcome.title, unigram_entropy=entropy
    )
    report = page.Report(
        title=outcome.title,
        subtitle=str(output),
        facts=headline(outcome.steps, outcome.last_evaluation, entropy, outcome.num_parameters) | outcome.facts,
        steps=outcome.steps,
        evaluations=outcome.evaluations,
        settings=to_yaml(config),
        routed_table=outcome.routed_table,
        sample=text,
        unigram_entropy=entropy,
    )
    _write(output / "report.html", page.render(report))
    print(f"Report saved at {output}/report.html")


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
