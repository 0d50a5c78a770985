"""parity.html: the whole comparison on one page that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from apps.parity.plot import COLOURS, by_block
from apps.parity.results import MEASURES, LayerResult, VariantResult, snr_db, why_empty
from apps.parity.tables import Table, all_tables, decibels, error_text
from apps.training.reporting.page import chart_card, document
from apps.training.reporting.svg_chart import Line

STYLE = """
main { max-width: 1080px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th.text, td.text { text-align: left; }
tr:last-child td { border-bottom: none; } .wide { overflow-x: auto; } details .wide { margin-top: 10px; }
td.text { font-family: ui-monospace, monospace; } p.note { color: var(--soft); font-size: 13px; }
""" + "".join(
    f"svg .line{index} {{ stroke: {colour}; stroke-width: 2; }} .legend i.line{index}::before {{ color: {colour}; }}\n"
    for index, colour in enumerate(COLOURS)
)
TEXT = ' class="text"'  # of the cells that are no numbers
NOTES = (
    "Relative error: ‖other − reference‖ / ‖reference‖ over all elements of all batches measured. SNR: 10 log10 of "
    "the reference's power over the error's. Local: a layer fed with the reference's input and output gradient. "
    "Accumulated: the layer's output when the whole model runs by itself. All in evaluation mode: backends' statistics "
    "stand still.",
    "KL: mean of KL(reference ‖ other) over the counted positions. Perplexity: of the same positions, each weighed "
    "alike, as a run's own evaluation has it.",
    "Forward: evaluation mode, no gradients. Fwd + bwd: training mode with statistics and every weight's gradient, no "
    "update. Medians of rounds in turns. Memory: the peak of fwd + bwd above what was there before, measured on CUDA "
    "only. Energy: of the forward's products by the backend's own model; layers of a backend without one are left out. "
    "It is that of a batch over its tokens: what is paid once a batch, as weights are, weighs less in a larger one.",
)


@dataclass(frozen=True)
class ParityPage:
    """What the page shows. `facts`: label → value, in order."""

    title: str
    subtitle: str
    facts: Mapping[str, str]
    reference: VariantResult
    others: Sequence[VariantResult]
    settings: str


def render(page: ParityPage) -> str:
    """The whole page."""
    tiles = "".join(
        f'<div class="fact"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for label, value in page.facts.items()
    )
    tables = all_tables(page.reference, page.others)
    before = len(tables) - len(page.others)  # the tables of layers come after the charts
    body = [
        f"<h1>{escape(page.title)}</h1>",
        f'<p class="sub">{escape(page.subtitle)}</p>',
        f'<div class="facts">{tiles}</div>',
        *(part for table in tables[:before] for part in _card(table)),
        *(part for measure in MEASURES for part in _chart(page.others, measure)),
        *(part for table in tables[before:] for part in _card(table)),
        "<h2>Every layer</h2>",
        *(_every_layer(variant) for variant in page.others),
        "<h2>What was routed</h2>",
        *(_folded(variant.name, f"<pre>{escape(variant.routed_table)}</pre>") for variant in _all(page)),
        "<h2>What the numbers are</h2>",
        *(f'<p class="note">{escape(note)}</p>' for note in NOTES),
        "<h2>Settings</h2>",
        _folded("config.yaml", f"<pre>{escape(page.settings)}</pre>"),
    ]
    return document(page.title, body, STYLE)


def _all(page: ParityPage) -> list[VariantResult]:
    return [page.reference, *page.others]


def _chart(others: Sequence[VariantResult], measure: str) -> list[str]:
    lines = []
    for index, variant in enumerate(others):
        points = [(block, snr_db(median(values))) for block, values in by_block(variant, measure).items()]
        lines.append(Line(variant.name, points, f"line{index % len(COLOURS)}"))
    title = MEASURES[measure].capitalize()
    card = chart_card(title, lines, x_label="block (the head comes last)", y_label="SNR (dB), median of a block")
    return card or [f'<h2>{escape(title)}</h2><p class="note">{why_empty(others, measure).capitalize()}.</p>']


def _every_layer(variant: VariantResult) -> str:
    head = ("layer", "by", *(f"{label}{unit}" for label in MEASURES.values() for unit in ("", ", dB")))
    return _folded(variant.name, _html(Table("", [head, *map(_cells, variant.layers)], left=2)))


def _cells(layer: LayerResult) -> tuple[str, ...]:
    errors = [layer.relative(measure) for measure in MEASURES]
    return (layer.layer, layer.backend, *(text(error) for error in errors for text in (error_text, decibels)))


def _card(table: Table) -> list[str]:
    return [f'<h2>{escape(table.title)}</h2><div class="card wide">{_html(table)}</div>']


def _folded(title: str, content: str) -> str:
    summary = f"<summary>{escape(title)}</summary>"
    return f'<div class="card"><details>{summary}<div class="wide">{content}</div></details></div>'


def _html(table: Table) -> str:
    lines = []
    for number, row in enumerate(table.rows):
        tag = "td" if number else "th"
        cells = "".join(
            f"<{tag}{TEXT if column < table.left else ''}>{escape(cell)}</{tag}>" for column, cell in enumerate(row)
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
