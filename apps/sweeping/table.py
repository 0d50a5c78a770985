"""sweep.csv, a row for each point in the sweep's order, and the table on the terminal, the best run first."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from apps.sweeping.grid import short_keys
from apps.sweeping.results import AVERAGED
from apps.sweeping.trials import Trial
from apps.training.files import atomic_path
from apps.training.progress import clock_time
from apps.training.reporting.lines import short
from backends.routing_table import plain_table

NUMBERS = (
    "train_loss",
    f"train_loss_last_{AVERAGED}",
    "dev_loss",
    "perplexity",
    "parameters",
    "steps",
    "tokens",
    "seconds",
)
WIDEST = 40  # characters of a cell


def write_csv(path: Path, trials: Sequence[Trial]) -> None:
    """The varied settings by their full names, then numbers (empty where there are none), status, error, folder."""
    keys = list(trials[0].point.labels)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*keys, *NUMBERS, "status", "error", "folder"])
        for trial in trials:
            labels = [trial.point.labels[key] for key in keys]
            writer.writerow([*labels, *_numbers(trial), trial.status, trial.error, trial.folder])


def _numbers(trial: Trial) -> list[object]:
    result, parameters = trial.result, trial.num_parameters
    if result is None:
        return ["", "", "", "", "" if parameters is None else parameters, "", "", ""]
    dev = ["" if number is None else number for number in (result.dev_loss, result.perplexity)]
    totals = [len(result.losses), result.tokens, round(result.seconds, 3)]
    return [result.train_loss, result.average_train_loss, *dev, parameters, *totals]


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Finished ones by dev loss (by train loss where there is none), the lowest first; the others behind them."""
    return sorted(trials, key=lambda trial: (trial.status != "done", _loss(trial)))


def _loss(trial: Trial) -> float:
    result = trial.result
    loss = math.inf if result is None else result.train_loss if result.dev_loss is None else result.dev_loss
    return loss if math.isfinite(loss) else math.inf


def table_rows(trials: Sequence[Trial]) -> list[list[str]]:
    """Head and rows as texts, ranked."""
    keys = list(trials[0].point.labels)
    shown = short_keys(keys)
    head = [*shown.values(), "train loss", "dev loss", "perplexity", "tokens", "time", "status", "folder"]
    return [head, *(_row(trial, keys) for trial in ranked(trials))]


def _row(trial: Trial, keys: Sequence[str]) -> list[str]:
    labels = [_cut(trial.point.labels[key]) for key in keys]
    result = trial.result
    if result is None:
        return [*labels, "–", "–", "–", "–", "–", trial.status, trial.folder.name]
    dev = ("–", "–") if result.dev_loss is None else (f"{result.dev_loss:.4f}", f"{result.perplexity:.5g}")
    numbers = [f"{result.train_loss:.4f}", *dev, short(result.tokens), clock_time(result.seconds)]
    return [*labels, *numbers, trial.status, trial.folder.name]


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def text_table(trials: Sequence[Trial]) -> str:
    """The table and, under it, why runs have failed."""
    rows = table_rows(trials)
    width = len(trials[0].point.labels)
    failed = [f"failed: {trial.point.name}: {trial.error}" for trial in trials if trial.status == "failed"]
    return "\n".join([plain_table(rows, right=range(width, width + 5)), *failed])
