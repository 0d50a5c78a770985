"""The tables of a comparison, as cells: what the terminal prints and the page shows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from apps.parity.results import LayerResult, VariantResult, middle, snr_db, worst
from apps.training.memory import gibibytes
from backends.routing_table import plain_table, shorten


@dataclass(frozen=True)
class Table:
    """A title and rows of cells, the first of them the heading; all columns but the first `left` are numbers."""

    title: str
    rows: Sequence[Sequence[str]]
    left: int = 1

    def text(self) -> str:
        """The table as lines of text under its title."""
        return f"{self.title}\n{plain_table(self.rows, right=range(self.left, len(self.rows[0])))}"


def all_tables(reference: VariantResult, others: Sequence[VariantResult]) -> list[Table]:
    """Numbers and costs of every backend, the energy's constants, then the layers of each but the reference."""
    variants = [reference, *others]
    constants = list(dict.fromkeys(row for each in variants for row in each.constants))
    stands_on = [Table("What the energy stands on", [("constant", "value", "source"), *constants], left=3)]
    return [numbers(reference, others), costs(variants), *(stands_on if constants else []), *map(layers, others)]


def numbers(reference: VariantResult, others: Sequence[VariantResult]) -> Table:
    """A row a backend: median errors of the layers it changes, the error at the head, KL and perplexity."""
    head = (
        "backend",
        "layers",
        "output",
        "SNR dB",
        "worst dB",
        "d input",
        "d weight",
        "at head",
        "KL",
        "perplexity",
    )
    rows = [head, (f"{reference.name} (reference)", *["–"] * 8, _perplexity(reference))]
    for each in others:
        changed = each.changed_layers
        output = middle(changed, "output")
        rows.append(
            (
                each.name,
                f"{sum(layer.changed for layer in changed)}/{len(each.layers)}",
                error_text(output),
                decibels(output),
                decibels(worst(changed, "output").relative("output")),
                error_text(middle(changed, "input_gradient")),
                error_text(middle(changed, "weight_gradient")),
                error_text(each.layers[-1].relative("accumulated")),
                error_text(each.kl),
                _perplexity(each),
            )
        )
    return Table("Relative errors of the layers it changes, each alone, median; KL (nats) and perplexity on dev", rows)


def costs(variants: Sequence[VariantResult]) -> Table:
    """A row a backend: time and memory of a batch, energy of a token."""
    rows = [("backend", "forward", "fwd + bwd", "× reference", "memory", "energy a token", "of FLOPs")]
    for each in variants:
        time, energy = each.timing, each.energy
        rows.append(
            (
                each.name,
                milliseconds(time.forward),
                milliseconds(time.step),
                f"{time.ratio:.2f}",
                "–" if time.memory is None else gibibytes(time.memory),
                joules(energy.joules),
                "–" if energy.joules is None else f"{energy.share:.0%}",
            )
        )
    return Table("A batch's time and memory; energy of the forward's products", rows)


def layers(variant: VariantResult) -> Table:
    """A row for the layers that differ only in their block, those with the worst one first."""
    head = ("layers, worst first", "by", "output", "worst", "SNR dB", "at", "d input", "d weight", "accumulated")
    rows = [head]
    for group in variant.groups().values():
        last = worst(group, "output")
        rows.append(
            (
                shorten(layer.layer for layer in group)[0],
                _backends(group),
                error_text(middle(group, "output")),
                error_text(last.relative("output")),
                decibels(last.relative("output")),
                _block(last.layer),
                error_text(middle(group, "input_gradient")),
                error_text(middle(group, "weight_gradient")),
                error_text(middle(group, "accumulated")),
            )
        )
    return Table(f"Layers of {variant.name}", rows, left=2)


def error_text(relative: float | None) -> str:
    """Three digits; "–" where there is nothing to compare."""
    if relative is None or math.isnan(relative):
        return "–"
    return "∞" if math.isinf(relative) else f"{relative:.2e}" if 0 < relative < 1e-3 else f"{relative:.3g}"


def decibels(relative: float) -> str:
    """The SNR of a relative error, in dB."""
    value = snr_db(relative)
    return "–" if math.isnan(value) else ("∞" if value > 0 else "-∞") if math.isinf(value) else f"{value:.1f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def joules(value: float | None) -> str:
    """`3.2 µJ`; "–" without an energy model."""
    if value is None:
        return "–"
    for size, unit in ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-12:.3g} pJ"


def _perplexity(variant: VariantResult) -> str:
    return f"{variant.evaluation.perplexity:.4f}"


def _backends(group: Sequence[LayerResult]) -> str:
    """Who computes them: names without package and options, which the table of what was routed has."""
    names = (re.sub(r"\(.*|[\w.]+:(?=\w)", "", layer.backend) for layer in group)
    return ", ".join(dict.fromkeys(names))


def _block(layer: str) -> str:
    return next((part for part in layer.split(".") if part.isdecimal()), "")
