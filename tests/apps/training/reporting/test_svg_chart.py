"""The inline chart: well-formed, inside its frame, honest about spikes, and calm about nothing to show."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.reporting.svg_chart import HEIGHT, MAX_POINTS, WIDTH, Line, line_chart, nice_ticks, running_mean

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.lists(numbers, min_size=1, max_size=50), st.none() | numbers)
def test_any_series_gives_well_formed_svg_inside_its_frame(values: list[float], level: float | None) -> None:
    line = Line("a <b> & c", list(enumerate(values)))
    chart = line_chart([line], x_label="x", y_label="<y>", level=None if level is None else ("level", level))
    root = ElementTree.fromstring(chart)
    (path,) = root.iter("polyline")
    for place in path.attrib["points"].split():
        x, y = map(float, place.split(","))
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


def test_nothing_to_draw_gives_nothing_and_gaps_are_left_out() -> None:
    assert line_chart([Line("a", [])], x_label="x", y_label="y") == ""
    assert line_chart([Line("a", [(1, math.nan)])], x_label="x", y_label="y") == ""
    chart = line_chart([Line("a", [(1, 2.0), (2, math.inf), (3, 4.0)])], x_label="x", y_label="y")
    assert len(re.search(r'points="([^"]*)"', chart).group(1).split()) == 2


def test_whole_numbers_have_no_halves_between_them() -> None:
    ticks = [
        re.findall(r">([^<>]+)</text>", line_chart([Line("a", points)], x_label="x", y_label="y"))
        for points in ([(0, 0.0), (3, 0.0)], [(0.0, 0.0), (3.5, 0.0)])
    ]
    assert [place for place in ("0", "0.5", "1", "2", "3") if place in ticks[0]] == ["0", "1", "2", "3"]
    assert "0.5" in ticks[1]


def test_a_long_series_is_thinned_but_keeps_its_spike() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    chart = line_chart([Line("a", points)], x_label="x", y_label="y")
    heights = [float(place.split(",")[1]) for place in re.search(r'points="([^"]*)"', chart).group(1).split()]
    assert len(heights) <= MAX_POINTS
    assert min(heights) < max(heights) - 100


def test_running_mean_is_a_mean_that_neither_lags_nor_loses_finite_values() -> None:
    line = [float(x) for x in range(200)]
    assert running_mean(line)[:196] == pytest.approx(line[:196])
    assert running_mean([1.0, math.nan, 3.0])[2] == pytest.approx(3.0)
    assert math.isnan(running_mean([math.nan])[0])


@given(numbers, st.floats(1e-3, 1e6))
def test_ticks_are_even_and_inside_the_range(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)


def test_ticks_of_ones_own_and_marked_points() -> None:
    line = Line("loss", [(0.0, 1.0), (1.0, 2.0)], "series1", marked=True)
    chart = line_chart([line], x_label="model", y_label="loss", x_ticks=[(0.0, "a<b"), (1.0, "c")])
    assert "a&lt;b</text>" in chart
    assert chart.count('<circle class="series1"') == 2
    assert chart.count('<polyline class="series1"') == 1
