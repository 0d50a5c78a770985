"""What a comparison found, as plain numbers: printed, written to the CSV and drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from apps.parity.energy import Energy
from apps.parity.powers import Error
from apps.parity.timing import Timing
from apps.training.reporting.records import Evaluation

MEASURES = {
    "output": "output, local",
    "input_gradient": "input gradient, local",
    "weight_gradient": "weight gradient, local",
    "accumulated": "output, accumulated",
}


@dataclass(frozen=True)
class LayerResult:
    """One layer of one variant; every error is against the reference. None: there is nothing to compare.

    `changed`: another backend computes it than in the reference.
    """

    layer: str
    kind: Literal["linear", "attention"]
    backend: str
    changed: bool
    output: Error | None
    input_gradient: Error | None
    weight_gradient: Error | None
    accumulated: Error | None

    def relative(self, measure: str) -> float:
        """The relative error of one of `MEASURES`; NaN where there is none."""
        error: Error | None = getattr(self, measure)
        return math.nan if error is None else error.relative


@dataclass(frozen=True)
class VariantResult:
    """One variant. The reference has no layers and no KL, and a time ratio of 1."""

    name: str
    routed_table: str
    evaluation: Evaluation
    kl: float | None  # nats a token
    timing: Timing
    energy: Energy
    constants: list[tuple[str, str, str]] = field(default_factory=list)  # of the energy: name, value, source
    layers: list[LayerResult] = field(default_factory=list)

    @property
    def changed_layers(self) -> list[LayerResult]:
        """Those that another backend computes than in the reference; all where none does."""
        return [layer for layer in self.layers if layer.changed] or self.layers

    def groups(self) -> dict[str, list[LayerResult]]:
        """Layers that differ only in their block: `model.layers.*.mlp.up_proj` → those of all blocks; worst first."""
        groups: dict[str, list[LayerResult]] = {}
        for layer in self.layers:
            pattern = ".".join("*" if part.isdecimal() else part for part in layer.layer.split("."))
            groups.setdefault(pattern, []).append(layer)
        return dict(sorted(groups.items(), key=lambda item: -_rank(worst(item[1], "output"))))


def why_empty(variants: Iterable[VariantResult], measure: str) -> str:
    """What to say in place of a picture when none of the variants has an error of this kind that can be drawn."""
    layers = [layer for variant in variants for layer in variant.layers]
    errors = [layer.relative(measure) for layer in layers if getattr(layer, measure) is not None]
    if not errors:
        return "nothing to compare"
    return "no error that is finite" if any(errors) else "no error: equal bits"


def worst(layers: Iterable[LayerResult], measure: str) -> LayerResult:
    """The layer with the largest error; one that is not a number is worse than any, one without comes last."""
    return max(layers, key=lambda layer: _rank_of(layer, measure))


def middle(layers: Iterable[LayerResult], measure: str) -> float:
    """The median relative error; NaN when no layer has this error."""
    values = [layer.relative(measure) for layer in layers if getattr(layer, measure) is not None]
    return median(values) if values else math.nan


def snr_db(relative: float) -> float:
    """20 log10 (1 / relative error); infinite for 0."""
    return math.inf if relative == 0 else -20.0 * math.log10(relative) if relative > 0 else math.nan


def depths(names: Iterable[str]) -> Mapping[str, int]:
    """Layer → its block's number, the first number in its name; the head and others without one come after the last."""
    numbers = {name: next((int(part) for part in name.split(".") if part.isdecimal()), None) for name in names}
    after = max((number for number in numbers.values() if number is not None), default=-1) + 1
    return {name: after if number is None else number for name, number in numbers.items()}


def _rank(layer: LayerResult) -> float:
    return _rank_of(layer, "output")


def _rank_of(layer: LayerResult, measure: str) -> float:
    if getattr(layer, measure) is None:
        return -1.0
    relative = layer.relative(measure)
    return math.inf if math.isnan(relative) else relative
