"""What the pictures show: final loss against the first numeric setting, a line for each combination of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, pstdev

from apps.sweeping.grid import short_keys
from apps.sweeping.trials import Trial
from apps.training.reporting.svg_chart import Points, running_mean

DECADE = 10.0


@dataclass(frozen=True)
class Series:
    label: str
    points: Points


@dataclass(frozen=True)
class Comparison:
    """`series` over the values of setting `key`. `names`: what stands at x = 0, 1, 2, … where it has no numbers."""

    key: str
    loss: str  # "dev loss" or "train loss"
    series: list[Series]
    is_log: bool = False
    names: tuple[str, ...] = ()


def compare(trials: Sequence[Trial]) -> Comparison | None:
    """Of the finished trials; None when there are none."""
    done = [trial for trial in trials if trial.status == "done" and trial.result is not None]
    if not done:
        return None
    keys = list(done[0].point.labels)
    key = next((key for key in keys if all(_is_number(trial.point.values[key]) for trial in trials)), None)
    by_dev = all(trial.result and trial.result.dev_loss is not None for trial in done)
    names = () if key else tuple(dict.fromkeys(trial.point.labels[keys[0]] for trial in trials))
    axis = key or keys[0]
    lines: dict[str, list[tuple[float, float]]] = {}
    for trial in done:
        assert trial.result is not None
        loss = trial.result.dev_loss if by_dev else trial.result.average_train_loss
        x = names.index(trial.point.labels[axis]) if names else trial.point.values[axis]
        lines.setdefault(trial_label(trial, without=axis), []).append((float(x), float(loss or 0.0)))
    return Comparison(
        key=axis,
        loss="dev loss" if by_dev else "train loss",
        series=[Series(label, sorted(points)) for label, points in lines.items()],
        is_log=not names and is_log_spaced([trial.point.values[axis] for trial in trials]),
        names=names,
    )


def loss_curves(trials: Sequence[Trial]) -> list[Series]:
    """The running mean of each started run's loss over its steps."""
    return [
        Series(trial_label(trial), list(enumerate(running_mean(trial.result.losses), start=1)))
        for trial in trials
        if trial.result is not None
    ]


def trial_label(trial: Trial, *, without: str | None = None) -> str:
    """`lr 1e-4, seed 2`, but for the setting `without`; "" when there is no other."""
    short = short_keys(list(trial.point.labels))
    return ", ".join(f"{short[key]} {label}" for key, label in trial.point.labels.items() if key != without)


def is_log_spaced(values: Sequence[float]) -> bool:
    """Whether the values lie more evenly on a logarithmic axis; two of them, when they are a decade apart."""
    distinct = sorted(set(values))
    if len(distinct) < 2 or distinct[0] <= 0:
        return False
    if len(distinct) == 2:
        return distinct[1] >= DECADE * distinct[0]
    return _unevenness([math.log(value) for value in distinct]) < _unevenness(distinct)


def _unevenness(values: Sequence[float]) -> float:
    steps = [after - before for before, after in pairwise(values)]
    return pstdev(steps) / mean(steps)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
