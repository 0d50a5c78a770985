"""The losses of finished or running runs, read from the CSV in their folders."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from apps.training.reporting.output_folder import METRICS
from apps.training.reporting.summary import best_and_smoothed
from apps.training.reporting.svg_chart import running_mean
from backends.errors import UserError

AXES = {"steps": "step", "tokens": "tokens seen", "seconds": "seconds of training"}  # field → label


@dataclass(frozen=True)
class Curve:
    """One run: its losses, and where each lies on the axes (totals so far)."""

    label: str
    losses: Sequence[float]
    steps: Sequence[float]
    tokens: Sequence[float]
    seconds: Sequence[float]

    def points(self, axis: str) -> list[tuple[float, float]]:
        """(place on the axis, running mean of the loss) for every step."""
        return list(zip(getattr(self, axis), running_mean(self.losses), strict=True))

    @property
    def facts(self) -> tuple[str, ...]:
        """Label, steps, and best, last and smoothed loss as texts."""
        best, _, smoothed, _ = best_and_smoothed(self.losses)
        numbers = (best, self.losses[-1], smoothed)
        return (self.label, f"{self.steps[-1]:g}", *(f"{number:.4f}" for number in numbers))


def read_curves(folders: Sequence[str]) -> list[Curve]:
    """The runs in `folders`, each a run's output folder or a folder of such; UserError for one that holds none."""
    found = list(dict.fromkeys(run for folder in folders for run in _runs_in(Path(folder))))
    labels = _labels(found)
    curves = [_read(folder / METRICS, label) for folder, label in zip(found, labels, strict=True)]
    return [curve for curve in curves if curve.losses]


def _runs_in(folder: Path) -> list[Path]:
    if (folder / METRICS).is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    if not inside:
        raise UserError(
            f"'{folder}' holds no run: it has no {METRICS}, nor has a folder in it. Expected a training.output_dir."
        )
    return inside


def _labels(folders: Sequence[Path]) -> list[str]:
    """Each folder without what all have in common."""
    if len(folders) == 1:
        return [folders[0].resolve().name]
    texts = [str(folder.resolve()) for folder in folders]
    common = os.path.commonpath([str(Path(text).parent) for text in texts])
    return [os.path.relpath(text, common) for text in texts]


def _read(path: Path, label: str) -> Curve:
    """The complete rows: the last one of a run that is going on may be half a row."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    try:
        return Curve(
            label,
            losses=[float(row["Step Loss"]) for row in rows],
            steps=[float(row["Step"]) for row in rows],
            tokens=list(accumulate(float(row["Tokens in Step"]) for row in rows)),
            seconds=list(accumulate(float(row["Time per Step"]) for row in rows)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Expected the metrics of a run of train_llm.py.") from None
