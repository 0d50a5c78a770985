"""A line chart as inline SVG: no file beside the page, no script, and the page's colours in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate

from apps.training.reporting.lines import short

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 40
MAX_POINTS = 800  # more than the picture has pixels for

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One line of a chart. `style` is a CSS class of the page: "raw", "main", "dots" (points instead of a line).

    `marked`: a dot of that class on each point of the line.
    """

    label: str
    points: Points
    style: str = "main"
    marked: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """The chart as an `<svg>` element. `level` is a labelled horizontal dashed line. "" when there is nothing to draw.

    `x_ticks`: places and their texts, for an axis of logarithms or of names. Points that are not finite are left out.
    """
    drawn = [replace(line, points=_finite(line.points)) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + ([level[1]] if level else [])
    frame = _Frame(*_padded(min(xs), max(xs), 0.0), *_padded(min(ys), max(ys), 0.05))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">'
    ]
    if x_ticks is None:
        whole = all(float(x).is_integer() for x in xs)  # there is no half step
        values = nice_ticks(frame.x_low, frame.x_high, 7)
        x_ticks = [(value, _tick(value)) for value in values if value.is_integer() or not whole]
    parts += _axes(frame, x_ticks, x_label, y_label)
    if level:
        y = frame.y(level[1])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="level" x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(level[0])}</text>'
        )
    for line in drawn:
        if line.style != "dots":
            parts.append(_path(line, frame))
        if line.style == "dots" or line.marked:
            parts += _dots(line, frame)
    return "\n".join([*parts, "</svg>"])


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window around each value, a twenty-fifth of the whole wide; values that are not finite are left out.

    Looking both ways it does not lag behind a falling loss; it is narrower at the start, where the loss falls fastest.
    """
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    sums = [0.0, *accumulate(finite)]
    counts = [0, *accumulate(math.isfinite(value) for value in values)]
    result = []
    for index in range(len(values)):
        half = min(len(values) // 50, index)
        first, after = index - half, min(index + half + 1, len(values))
        count = counts[after] - counts[first]
        result.append((sums[after] - sums[first]) / count if count else math.nan)
    return result


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.y_high - value) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _axes(frame: _Frame, x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> list[str]:
    parts = []
    for value in nice_ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    for value, text in x_ticks:
        parts.append(
            f'<text x="{frame.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(text)}</text>'
        )
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="label" x="{middle_x}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" x="14" y="{middle_y}" text-anchor="middle" transform="rotate(-90 14 {middle_y})">'
        f"{escape(y_label)}</text>"
    )
    return parts


def _path(line: Line, frame: _Frame) -> str:
    places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in _thinned(line.points))
    return f'<polyline class="{line.style}" points="{places}"><title>{escape(line.label)}</title></polyline>'


def _dots(line: Line, frame: _Frame) -> list[str]:
    style = "dot" if line.style == "dots" else line.style
    return [
        f'<circle class="{style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4">'
        f"<title>{escape(line.label)} {y:.4f} at {x:g}</title></circle>"
        for x, y in line.points
    ]


def _thinned(points: Points) -> Points:
    """At most MAX_POINTS: of each stretch the lowest and the highest, so that a spike stays visible."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with a margin; a single value gets one of its own size around it."""
    span = (high - low) or max(abs(high), 1e-12)
    extra = span * share if high > low else span * 0.5
    return low - extra, high + extra


def _tick(value: float) -> str:
    """`0.25`, `4`, `12k`, `3e-4`."""
    if value != 0 and abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return short(value) if abs(value) >= 10_000 else f"{value:g}"
