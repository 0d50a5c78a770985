"""sweep.html: one file with the losses of all runs, their curves and the table. It loads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from apps.sweeping.comparison import Comparison, Series, compare, loss_curves, trial_label
from apps.sweeping.picture import COLOURS
from apps.sweeping.table import ranked, table_rows
from apps.sweeping.trials import Trial
from apps.training.progress import clock_time
from apps.training.reporting.lines import short
from apps.training.reporting.page import chart_card, document, heading
from apps.training.reporting.svg_chart import Line

STYLE = """
main { max-width: 1080px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } tr.best td { font-weight: 600; } .scroll { overflow-x: auto; }
svg circle { stroke: none !important; }
""" + "".join(
    f"svg .series{number} {{ stroke: {colour}; stroke-width: 1.8; fill: {colour}; }} svg polyline.series{number} "
    f"{{ fill: none; }} .legend i.series{number}::before {{ color: {colour}; }}\n"
    for number, colour in enumerate(COLOURS)
)


def render(trials: Sequence[Trial], *, title: str, subtitle: str) -> str:
    """The whole page."""
    comparison = compare(trials)
    body = [
        *heading(title, subtitle, _facts(trials)),
        *(_comparison_chart(comparison) if comparison is not None else []),
        *_chart("Loss curves", loss_curves(trials), "step", "train loss, running mean (nats per token)"),
        *_table(trials),
        *_failures(trials),
    ]
    return document(title, body, STYLE)


def _facts(trials: Sequence[Trial]) -> dict[str, str]:
    done = [trial for trial in ranked(trials) if trial.status == "done" and trial.result is not None]
    facts = {"runs done": f"{len(done)} of {len(trials)}"}
    if done:
        best = done[0].result
        assert best is not None
        dev = best.dev_loss
        facts["lowest train loss" if dev is None else "lowest dev loss"] = (
            f"{best.train_loss if dev is None else dev:.4f}"
        )
        facts["with"] = trial_label(done[0])
    results = [trial.result for trial in trials if trial.result is not None]
    return facts | {
        "tokens seen": short(sum(result.tokens for result in results)),
        "training time": clock_time(sum(result.seconds for result in results)),
    }


def _comparison_chart(comparison: Comparison) -> list[str]:
    """On an axis of logarithms the chart gets the logarithms, and their numbers as texts."""
    series, label = comparison.series, comparison.key
    places = sorted({x for line in series for x, _ in line.points})
    ticks = [(x, f"{x:g}") for x in places] if len(places) <= 12 else None
    if comparison.names:
        ticks = [(float(number), name[:20]) for number, name in enumerate(comparison.names)]
    elif comparison.is_log:
        series = [Series(line.label, [(math.log10(x), y) for x, y in line.points]) for line in series]
        ticks = [(math.log10(x), f"{x:g}") for x in places]
    title = f"{comparison.loss.capitalize()} against {label}"
    return _chart(title, series, label, f"{comparison.loss} (nats per token)", ticks, marked=True)


def _chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    ticks: Sequence[tuple[float, str]] | None = None,
    *,
    marked: bool = False,
) -> list[str]:
    lines = [
        Line(line.label or title, line.points, f"series{number % len(COLOURS)}", marked)
        for number, line in enumerate(series)
    ]
    return chart_card(title, lines, x_label=x_label, y_label=y_label, x_ticks=ticks)


def _table(trials: Sequence[Trial]) -> list[str]:
    head, *rows = table_rows(trials)
    cells = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for number, row in enumerate(rows):
        best = ' class="best"' if number == 0 and ranked(trials)[0].status == "done" else ""
        folder = escape(row[-1])
        link = f'<td><a href="{folder}/report.html">{folder}</a></td>'
        cells.append(f"<tr{best}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[:-1]) + link + "</tr>")
    return [f'<h2>Runs</h2><div class="card scroll"><table>{"".join(cells)}</table></div>']


def _failures(trials: Sequence[Trial]) -> list[str]:
    failed = [f"{trial.point.name}: {trial.error}" for trial in trials if trial.status == "failed"]
    text = escape("\n".join(failed))
    return [f'<h2>Failed</h2><div class="card"><pre>{text}</pre></div>'] if failed else []
