"""parity.png: the errors through the depth of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from apps.parity.results import MEASURES, VariantResult, depths, why_empty
from apps.training.files import atomic_path

COLOURS = ("#1f5fa8", "#d1495b", "#2f8f5b", "#b8751c", "#7a4fb5", "#3b8ea5")


def write_plot(path: Path, others: Sequence[VariantResult], *, title: str) -> None:
    """A panel for each error: a line through the median of each block's layers, in a band from the least to the most.

    Logarithmic: an error of 0 has no place there and is left out; a panel without any error says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7.5), dpi=150, layout="constrained")
    figure.suptitle(title)
    shown: dict[str, Any] = {}
    for axes, (measure, label) in zip(figure.subplots(2, 2).flat, MEASURES.items(), strict=True):
        drawn = False
        for index, variant in enumerate(others):
            blocks = by_block(variant, measure)
            if blocks:
                colour, numbers = COLOURS[index % len(COLOURS)], list(blocks)
                middles = [median(values) for values in blocks.values()]
                (line,) = axes.plot(numbers, middles, "o-", color=colour, markersize=3.5, linewidth=1.8)
                shown.setdefault(variant.name, line)
                lows, highs = ([edge(values) for values in blocks.values()] for edge in (min, max))
                axes.fill_between(numbers, lows, highs, color=colour, alpha=0.13, linewidth=0)
                drawn = True
        axes.set(title=label, xlabel="block (the head comes last)", ylabel="relative error")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        if drawn:
            axes.set_yscale("log")
            axes.grid(alpha=0.25)
        else:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, why_empty(others, measure), transform=axes.transAxes, ha="center", color="#6b7280")
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2, frameon=False)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def by_block(variant: VariantResult, measure: str) -> dict[int, list[float]]:
    """Block → the relative errors of its layers that are neither 0 nor infinite; blocks without one are left out."""
    depth = depths(layer.layer for layer in variant.layers)
    blocks: dict[int, list[float]] = {}
    for layer in variant.layers:
        relative = layer.relative(measure)
        if relative > 0 and math.isfinite(relative):
            blocks.setdefault(depth[layer.layer], []).append(relative)
    return dict(sorted(blocks.items()))
