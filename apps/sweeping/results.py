"""What a run left in its folder, read back: losses, tokens, time. Imports no torch."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from apps.training.reporting.output_folder import METRICS

AVERAGED = 50  # last steps whose loss is averaged: one batch's is a matter of luck
SUMMARY = {
    "steps": re.compile(r"^Per worker number of batches \(steps\): ([\d,]+)$", re.MULTILINE),
    "loss": re.compile(r"^Evaluation loss: (\S+), Perplexity: \S+$", re.MULTILINE),
    "perplexity": re.compile(r"^Evaluation loss: \S+, Perplexity: (\S+)$", re.MULTILINE),
}


@dataclass(frozen=True)
class Result:
    """The numbers of a run up to its last recorded step, of `expected_steps`; losses in nats a token."""

    losses: tuple[float, ...]  # of steps 1, 2, …
    tokens: int
    seconds: float
    expected_steps: int | None = None  # known when the run has ended
    dev_loss: float | None = None
    perplexity: float | None = None
    has_report: bool = False

    @property
    def train_loss(self) -> float:
        """Of the last step."""
        return self.losses[-1]

    @property
    def average_train_loss(self) -> float:
        """Over the last `AVERAGED` steps."""
        last = self.losses[-AVERAGED:]
        return sum(last) / len(last)

    def is_complete(self, *, evaluated: bool) -> bool:
        """Whether all steps were taken and everything was written, the dev loss too if it was asked for."""
        ended = self.has_report and len(self.losses) == self.expected_steps
        return ended and (self.dev_loss is not None or not evaluated)


def read_result(folder: Path) -> Result | None:
    """None where no step was recorded, or what is there cannot be read."""
    try:
        with (folder / METRICS).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        losses = tuple(float(row["Step Loss"]) for row in rows)
        tokens = sum(int(row["Tokens in Step"]) for row in rows)
        seconds = sum(float(row["Time per Step"]) for row in rows)
    except (OSError, KeyError, TypeError, ValueError):  # a last line that a kill cut short
        return None
    if not losses:
        return None
    steps, dev_loss, perplexity = (_summed_up(folder, name) for name in ("steps", "loss", "perplexity"))
    return Result(
        losses,
        tokens,
        seconds,
        expected_steps=None if steps is None else int(steps),
        dev_loss=dev_loss,
        perplexity=perplexity,
        has_report=(folder / "report.html").is_file(),
    )


def _summed_up(folder: Path, name: str) -> float | None:
    try:
        found = SUMMARY[name].search((folder / "summary.txt").read_text(encoding="utf-8"))
    except OSError:
        return None
    return float(found[1].replace(",", "")) if found else None
