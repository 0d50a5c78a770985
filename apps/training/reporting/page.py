"""report.html: one file that shows a run to a person. It loads nothing: styles and charts are inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.reporting.svg_chart import Line, line_chart, running_mean

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1c2330; --soft: #667085; --rule: #e4e6ea;
  --raw: #b4c7e3; --main: #1f5fa8; --dot: #c8374d; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1c2027; --ink: #e6e9ee; --soft: #98a2b3;
  --rule: #2f353f; --raw: #34507a; --main: #7db2f2; --dot: #ff7b8a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 10px; }
.sub { color: var(--soft); margin: 0 0 22px; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 10px; }
.fact, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 16px; }
.fact b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.fact span { color: var(--soft); font-size: 13px; }
.legend { color: var(--soft); font-size: 13px; margin: 0 0 6px; } .legend i { font-style: normal; margin-right: 14px; }
.legend i::before { content: "●  "; color: var(--main); }
.legend i.raw::before { color: var(--raw); } .legend i.dots::before { color: var(--dot); }
svg { width: 100%; height: auto; display: block; font-size: 12px; }
svg text { fill: var(--soft); } svg text.label { fill: var(--ink); }
svg .grid { stroke: var(--rule); } svg .level { stroke: var(--soft); stroke-dasharray: 5 4; }
svg text.level { stroke: none; }
svg polyline { fill: none; stroke-linejoin: round; } svg .raw { stroke: var(--raw); } svg .dot { fill: var(--dot); }
svg .main { stroke: var(--main); stroke-width: 2; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
pre.table { white-space: pre; overflow-x: auto; } .prompt { color: var(--soft); }
summary { cursor: pointer; color: var(--soft); } details pre { margin-top: 10px; }
"""


@dataclass(frozen=True)
class Report:
    """What the page shows. `facts`: label → value, in order. `sample`: (prompt, continuation)."""

    title: str
    subtitle: str
    facts: Mapping[str, str]
    steps: Sequence[StepRecord]
    evaluations: Sequence[Evaluation]
    settings: str
    routed_table: str
    sample: tuple[str, str] | None = None
    unigram_entropy: float | None = None  # nats a token: what a model knowing only frequencies reaches


def render(report: Report) -> str:
    """The whole page."""
    body = [
        *heading(report.title, report.subtitle, report.facts),
        *_charts(report),
        *_sample(report),
        f'<h2>Layers and backends</h2><div class="card"><pre class="table">{escape(report.routed_table)}</pre></div>',
        '<h2>Settings</h2><div class="card"><details><summary>config.yaml</summary>'
        f"<pre>{escape(report.settings)}</pre></details></div>",
    ]
    return document(report.title, body)


def heading(title: str, subtitle: str, facts: Mapping[str, str]) -> list[str]:
    """How a page's body begins: its title and a tile for each of `facts`, label → value."""
    tiles = "".join(
        f'<div class="fact"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in facts.items()
    )
    return [f"<h1>{escape(title)}</h1>", f'<p class="sub">{escape(subtitle)}</p>', f'<div class="facts">{tiles}</div>']


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """A page that loads nothing: the parts of its body, in the house's style and what `style` adds to it."""
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
    )
    return head + "<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"


def _charts(report: Report) -> list[str]:
    steps = report.steps
    losses = [record.loss for record in steps]
    speeds = [record.tokens_per_second for record in steps]
    loss = [_line("each step", steps, losses, "raw"), _line("running mean", steps, running_mean(losses))]
    if report.evaluations:
        loss.append(Line("evaluation", [(point.step, point.loss) for point in report.evaluations], "dots"))
    level = None if report.unigram_entropy is None else ("unigram entropy", report.unigram_entropy)
    speed = [_line("each step", steps, speeds, "raw"), _line("running mean", steps, running_mean(speeds))]
    rate = [_line("learning rate", steps, [record.lr for record in steps])]
    return [
        *chart_card("Loss", loss, x_label="step", y_label="loss (nats per token)", level=level),
        *chart_card("Learning rate", rate, x_label="step", y_label="learning rate"),
        *chart_card("Throughput", speed, x_label="step", y_label="tokens per second"),
    ]


def _line(label: str, steps: Sequence[StepRecord], values: Sequence[float], style: str = "main") -> Line:
    return Line(label, [(record.step, value) for record, value in zip(steps, values, strict=True)], style)


def chart_card(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> list[str]:
    """A heading and a chart with its legend; nothing when there is nothing to draw. The rest: see `line_chart`."""
    chart = line_chart(lines, x_label=x_label, y_label=y_label, level=level, x_ticks=x_ticks)
    if not chart:
        return []
    names = "".join(f'<i class="{line.style}">{escape(line.label)}</i>' for line in lines if len(lines) > 1)
    legend = f'<p class="legend">{names}</p>' if names else ""
    return [f'<h2>{escape(title)}</h2><div class="card">{legend}{chart}</div>']


def _sample(report: Report) -> list[str]:
    if report.sample is None:
        return []
    prompt, continuation = report.sample
    text = f'<span class="prompt">{escape(prompt)}</span>{escape(continuation)}'
    return [f'<h2>Sample text</h2><div class="card"><pre>{text}</pre></div>']
