"""sweep.png: the final losses beside the loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.sweeping.comparison import Comparison, Series, compare, loss_curves
from apps.sweeping.trials import Trial
from apps.training.files import atomic_path

COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#0f8b8d", "#8d5524", "#6b7280")
MOST_NAMED = 12  # lines that still fit a legend


def write_picture(path: Path, trials: Sequence[Trial], *, title: str) -> bool:
    """Write the picture; False, and nothing written, when no run has a loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    comparison, curves = compare(trials), loss_curves(trials)
    if not curves:
        return False
    figure = Figure(figsize=(13, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    if comparison is not None:
        _draw_comparison(left, comparison)
    _draw(right, curves)
    right.set(xlabel="step", ylabel="train loss, running mean (nats per token)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return True


def _draw_comparison(axes: Any, comparison: Comparison) -> None:
    _draw(axes, comparison.series, marker="o")
    axes.set(xlabel=comparison.key, ylabel=f"{comparison.loss} (nats per token)")
    if comparison.is_log:
        axes.set_xscale("log")
    if comparison.names:
        axes.set_xticks(range(len(comparison.names)), [name[:24] for name in comparison.names])


def _draw(axes: Any, series: Sequence[Series], marker: str = "") -> None:
    for number, line in enumerate(series):
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        colour, dash = COLOURS[number % len(COLOURS)], ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
        axes.plot(xs, ys, marker=marker, color=colour, linestyle=dash, linewidth=1.6, label=line.label[:48] or None)
    if any(line.label for line in series) and len(series) <= MOST_NAMED:
        axes.legend(frameon=False, fontsize=8)
