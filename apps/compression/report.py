"""What a compression tells: a table of layers, compression.csv, and the spectra as compression.png."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from apps.training.files import atomic_path
from backends.routing_table import count_text, plain_table
from modelzoo.compression import LayerReport

CSV, PICTURE = "compression.csv", "compression.png"
COLUMNS = ("layer", "in", "out", "rank", "break_even", "numbers", "dense_numbers", "predicted", "measured", "relative")


def relative(report: LayerReport) -> float:
    """The error against what the layer's outputs vary."""
    return report.measured / report.variance if report.variance > 0 else 0.0


def layer_table(reports: Sequence[LayerReport]) -> str:
    """A line for each layer; one left dense says so."""
    rows = [("layer", "rank", "break-even", "numbers", "error", "of the outputs' variance")]
    for each in reports:
        rank = "dense" if each.rank is None else str(each.rank)
        numbers = f"{count_text(each.numbers)} of {count_text(each.shape.dense)}"
        rows.append(
            (each.name, rank, str(each.shape.most + 1), numbers, f"{each.measured:.4g}", f"{relative(each):.2%}")
        )
    return plain_table(rows, right=(1, 2, 3, 4, 5))


def summary(reports: Sequence[LayerReport]) -> list[str]:
    """The whole in a few lines: numbers, FLOPs, layers."""
    before, after = sum(each.shape.dense for each in reports), sum(each.numbers for each in reports)
    dense = [each.name for each in reports if each.rank is None]
    lines = [
        f"Layers: {len(reports) - len(dense)} compressed, {len(dense)} left dense",
        f"Numbers of these layers: {before:,} before, {after:,} after ({after / before:.1%})",
        f"FLOPs of a token in these layers: {2 * before:,} before, {2 * after:,} after",
    ]
    if dense:
        lines.append(
            "Left dense, given a rank or a share of numbers at which two factors hold no fewer numbers: "
            + ", ".join(dense[:3])
            + (f" and {len(dense) - 3} more" if len(dense) > 3 else "")
        )
    return lines


def write_csv(path: Path, reports: Sequence[LayerReport], *, predicts: bool) -> None:
    """compression.csv, complete or not at all; errors are E|y − ŷ|² of a token."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for each in reports:
            shape, rank = each.shape, "" if each.rank is None else each.rank
            predicted = each.predicted if predicts and each.rank is not None else ""
            sizes = (shape.in_features, shape.out_features, rank, shape.most + 1, each.numbers, shape.dense)
            writer.writerow((each.name, *sizes, predicted, each.measured, relative(each)))


def write_picture(path: Path, reports: Sequence[LayerReport], title: str) -> None:
    """For each kind of layer, what each further rank removes of the error: a line for each block, a dot at its rank."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, list[LayerReport]] = {}
    for each in reports:
        if each.rank is not None:
            kinds.setdefault(each.name.rpartition(".")[2], []).append(each)
    columns = min(4, max(1, len(kinds)))
    rows = max(1, -(-len(kinds) // columns))
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows + 0.5), dpi=150, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (kind, layers) in zip(panels, kinds.items(), strict=False):
        for index, each in enumerate(layers):
            assert each.rank is not None
            values = (each.spectrum / each.spectrum.sum().clamp_min(1e-300)).clamp_min(1e-16).tolist()
            colour = colormaps["viridis"](index / max(1, len(layers) - 1))
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=0.9)
            axes.plot(each.rank, values[min(each.rank, len(values)) - 1], "o", color=colour, markersize=3)
        axes.set(title=kind, yscale="log", xlabel="rank", ylabel="share of the whole")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels):
        axes.set_visible(False)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
