"""parity.csv, a row for every layer of every backend, and parity_summary.csv, a row for every backend."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from apps.parity.powers import Error
from apps.parity.results import MEASURES, VariantResult, depths
from apps.training.files import atomic_path

SUMMARY_COLUMNS = (
    "backend",
    "dev_loss",
    "perplexity",
    "counted_tokens",
    "kl_nats_per_token",
    "forward_seconds",
    "step_seconds",
    "step_time_ratio",
    "step_memory_bytes",
    "joules_per_token",
    "share_of_flops_with_energy",
)


def write_layers(path: Path, others: Sequence[VariantResult]) -> None:
    """Relative errors and SNR in dB as plain numbers; empty where there is nothing to compare, `inf` for equality."""
    measures = [f"{measure}_{what}" for measure in MEASURES for what in ("error", "snr_db")]
    rows: list[Sequence[object]] = [("backend", "layer", "block", "kind", "computed_by", *measures)]
    for variant in others:
        depth = depths(layer.layer for layer in variant.layers)
        for layer in variant.layers:
            errors = [cell for measure in MEASURES for cell in _cells(getattr(layer, measure))]
            rows.append((variant.name, layer.layer, depth[layer.layer], layer.kind, layer.backend, *errors))
    _write(path, rows)


def write_summary(path: Path, variants: Sequence[VariantResult]) -> None:
    """The reference first; its KL is 0 and its ratio 1."""
    rows: list[Sequence[object]] = [SUMMARY_COLUMNS]
    for variant in variants:
        evaluation, timing, energy = variant.evaluation, variant.timing, variant.energy
        values = (
            variant.name,
            evaluation.loss,
            evaluation.perplexity,
            evaluation.num_counted,
            0.0 if variant.kl is None else variant.kl,
            timing.forward,
            timing.step,
            timing.ratio,
            timing.memory,
            energy.joules,
            energy.share,
        )
        rows.append(["" if value is None else value for value in values])
    _write(path, rows)


def _cells(error: Error | None) -> tuple[object, object]:
    if error is None:
        return "", ""
    return error.relative, "nan" if math.isnan(error.snr_db) else error.snr_db


def _write(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
