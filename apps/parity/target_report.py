"""`compare_backends.py targets=[…]`: the tables and files of a comparison of targets."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import torch

from apps.parity.batches import Batches, find_dataset
from apps.parity.entries import Entry
from apps.parity.settings import CompareSettings
from apps.parity.tables import Table, error_text, milliseconds
from apps.parity.target_entries import Target
from apps.parity.targets import TargetResult, artifact_of, distance, plan_targets, run_target
from apps.training.config import to_yaml
from apps.training.devices import describe
from apps.training.files import atomic_path

SUMMARY, GRADIENTS = "targets.csv", "targets_gradients.csv"
COLUMNS = (
    "target",
    "first_loss",
    "last_loss",
    "worst_loss_error",
    "median_gradient_error",
    "worst_gradient_error",
    "worst_gradient",
    "worst_weight_error",
    "step_seconds",
    "step_time_ratio",
)


def compare_targets(settings: CompareSettings, targets: Sequence[Target], entry: Entry) -> None:
    """Run the step through every target, on the same weights and batches; print the table, write the files."""
    planned = plan_targets(targets, entry, settings)
    first = planned[0].plan
    device = torch.device(first.spec.device["kind"])
    batches = Batches(find_dataset(settings, first.model_config.vocab_size), settings, device)
    print(f"{first.routing.table()}\nDevice: {describe(device)}; dtypes: {settings.precision.table()}")
    print(f"Dataset: {batches.description()}\n", flush=True)
    artifacts = [artifact_of(each) for each in planned]
    results = [run_target(*each, batches, settings) for each in zip(planned, artifacts, strict=True)]
    print(f"{table(results).text()}\n")
    output = Path(settings.output_dir)
    _write(output / SUMMARY, [COLUMNS, *summary(results)])
    _write(output / GRADIENTS, gradient_rows(results))
    with atomic_path(output / "config.yaml") as temporary:
        temporary.write_text(to_yaml(settings), encoding="utf-8")
    print(f"Report saved at {output}/ ({SUMMARY}, {GRADIENTS}, config.yaml)")


def summary(results: Sequence[TargetResult]) -> list[tuple[str | float, ...]]:
    """A row of `COLUMNS` for each target; the first is the reference."""
    reference = results[0]
    rows: list[tuple[str | float, ...]] = []
    for each in results:
        losses = zip(each.losses, reference.losses, strict=True)
        errors = {name: distance(each.gradients[name], expected) for name, expected in reference.gradients.items()}
        worst = max(errors, key=errors.__getitem__)
        rows.append(
            (
                each.name,
                each.losses[0],
                each.losses[-1],
                max(abs(found - expected) / abs(expected) for found, expected in losses),
                median(errors.values()),
                errors[worst],
                worst,
                max(distance(each.weights[name], expected) for name, expected in reference.weights.items()),
                each.seconds,
                each.seconds / reference.seconds,
            )
        )
    return rows


def table(results: Sequence[TargetResult]) -> Table:
    """What the terminal shows of the summary."""
    head = ("target", "loss", "loss error", "d weight", "worst", "weights", "step", "× reference")
    rows: list[Sequence[str]] = [head]
    for name, _, loss, error, middle, worst, _, weights, seconds, ratio in summary(results):
        is_first = len(rows) == 1
        errors = ["–" if is_first else error_text(float(each)) for each in (error, middle, worst, weights)]
        shown = f"{name} (reference)" if is_first else str(name)
        rows.append((shown, f"{loss:.6f}", *errors, milliseconds(float(seconds)), f"{float(ratio):.2f}"))
    steps = len(results[0].losses)
    return Table(f"Relative errors over {steps} step{'s' if steps > 1 else ''}; gradients of the first batch", rows)


def gradient_rows(results: Sequence[TargetResult]) -> Iterable[Sequence[object]]:
    """A row for each parameter of each target but the reference."""
    yield ("target", "parameter", "gradient_error", "weight_error")
    reference = results[0]
    for each in results[1:]:
        for name, expected in reference.gradients.items():
            weight = distance(each.weights[name], reference.weights[name])
            yield each.name, name, distance(each.gradients[name], expected), weight


def _write(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
