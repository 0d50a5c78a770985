"""Curves as a PNG and as a page that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from apps.plotting.runs import AXES, Curve
from apps.sweeping.page import STYLE
from apps.sweeping.picture import COLOURS, MOST_NAMED
from apps.training.files import atomic_path
from apps.training.reporting.page import chart_card, document, heading
from apps.training.reporting.svg_chart import Line

LOSS = "train loss, running mean (nats per token)"
COLUMNS = ("run", "steps", "best loss", "last loss", "smoothed loss")


def write_png(path: Path, curves: Sequence[Curve], *, title: str) -> None:
    """Loss against steps, tokens and seconds, side by side; each loss faint, their running mean on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.8), dpi=150, layout="constrained")
    for axes, (axis, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for number, curve in enumerate(curves):
            colour, dash = COLOURS[number % len(COLOURS)], ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
            axes.plot(getattr(curve, axis), curve.losses, color=colour, linewidth=0.6, alpha=0.25)
            xs, ys = zip(*curve.points(axis), strict=True)
            axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.6, label=curve.label[:48])
        axes.set(xlabel=label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel=LOSS)
    if len(curves) <= MOST_NAMED:
        figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def write_page(path: Path, curves: Sequence[Curve], *, title: str, subtitle: str) -> None:
    """The same as a page, with a table of the losses."""
    body = heading(title, subtitle, {"runs": str(len(curves))})
    for axis, label in AXES.items():
        lines = [
            Line(curve.label, curve.points(axis), f"series{number % len(COLOURS)}")
            for number, curve in enumerate(curves)
        ]
        body += chart_card(f"Loss against {axis}", lines, x_label=label, y_label=LOSS)
    rows = [_row("th", COLUMNS), *(_row("td", curve.facts) for curve in curves)]
    body.append(f'<h2>Runs</h2><div class="card scroll"><table>{"".join(rows)}</table></div>')
    with atomic_path(path) as temporary:
        temporary.write_text(document(title, body, STYLE), encoding="utf-8")


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
