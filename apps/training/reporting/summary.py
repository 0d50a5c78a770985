"""summary.txt and the figures that sum a run up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.training.progress import clock_time
from apps.training.reporting.lines import evaluation_line, short, unigram_line
from apps.training.reporting.records import Evaluation, StepRecord


@dataclass(frozen=True)
class Totals:
    """The steps of a run together. Time is the steps' own: evaluation and saving are not in it."""

    tokens: int
    seconds: float
    steps: int

    @classmethod
    def of(cls, records: Sequence[StepRecord]) -> Totals:
        return cls(sum(r.num_tokens for r in records), sum(r.seconds for r in records), len(records))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps if self.steps else 0.0


def summary_text(
    overview: str,
    records: Sequence[StepRecord],
    evaluation: Evaluation | None,
    unigram_entropy: float | None,
    routed_table: str,
    model_parameters: Mapping[str, Any],
    *,
    efficiency: str | None = None,
) -> str:
    """The overview block, totals, losses, the layers' backends, and the model's parameters (its config) as JSON.

    `efficiency`: a line on FLOP/s and MFU.
    """
    totals = Totals.of(records)
    lines = [
        overview,
        f"Total tokens seen: {totals.tokens}",
        f"Tokens per second: {totals.tokens_per_second:.2f}",
        f"Average time per step: {totals.seconds_per_step:.6f}",
    ]
    lines += [] if efficiency is None else [efficiency]
    lines += loss_lines(records)
    if evaluation is not None:
        lines.append(evaluation_line(evaluation))
    if unigram_entropy is not None:
        lines.append(unigram_line(unigram_entropy))
    lines += ["", "Layers and backends:", routed_table]
    return "\n".join([*lines, "", "Model parameters:", json.dumps(model_parameters, indent=2), ""])


def best_and_smoothed(losses: Sequence[float]) -> tuple[float, int, float, int]:
    """The lowest loss and its place (from 0), the mean of the last twentieth of the losses and how many these are.

    Losses that are not finite count for neither; NaN when there is no other.
    """
    finite = [(loss, place) for place, loss in enumerate(losses) if math.isfinite(loss)]
    best, place = min(finite, default=(math.nan, 0))
    count = max(len(losses) // 20, 1)
    last = [loss for loss in losses[-count:] if math.isfinite(loss)]
    return best, place, sum(last) / len(last) if last else math.nan, count


def loss_lines(records: Sequence[StepRecord]) -> list[str]:
    """What the training losses came to, a line each; nothing before the first step."""
    if not records:
        return []
    best, place, smoothed, count = best_and_smoothed([record.loss for record in records])
    return [
        f"Last training loss: {records[-1].loss:.4f}",
        f"Best training loss: {best:.4f} (step {records[place].step})",
        f"Smoothed training loss: {smoothed:.4f} (mean of the last {count} steps)",
    ]


def headline(
    records: Sequence[StepRecord], evaluation: Evaluation | None, unigram_entropy: float | None, num_parameters: int
) -> dict[str, str]:
    """The tiles at the top of the report."""
    totals = Totals.of(records)
    facts: dict[str, str] = {}
    if evaluation is not None:
        facts |= {"evaluation loss": f"{evaluation.loss:.3f}", "perplexity": f"{evaluation.perplexity:.4g}"}
    if unigram_entropy is not None:
        facts["unigram entropy"] = f"{unigram_entropy:.3f}"
    if records:
        facts["last training loss"] = f"{records[-1].loss:.3f}"
    return facts | {
        "tokens seen": short(totals.tokens),
        "tokens per second": short(totals.tokens_per_second),
        "training time": clock_time(totals.seconds),
        "parameters": short(num_parameters),
    }
