"""The time a sweep will take, by a clock that is turned by hand."""

import pytest

from apps.sweeping.pace import Pace, share_of_run


def test_time_left_goes_by_the_work_done() -> None:
    now = [0.0]
    pace = Pace([1.0, 3.0], clock=lambda: now[0])
    pace.begin(0)
    assert pace.remaining() is None
    now[0] = 5.0
    pace.at(0.0)
    pace.at(0.5)
    assert pace.remaining() == pytest.approx(35.0)  # half a unit took 5 s, 3.5 are left
    pace.at(1.0)
    now[0] = 10.0
    pace.end()
    assert pace.remaining() == pytest.approx(30.0)
    pace.begin(1)
    pace.at(0.0)
    pace.at(1 / 3)
    now[0] = 20.0
    assert pace.remaining() == pytest.approx(20.0)


def test_what_an_earlier_start_did_took_no_time_now() -> None:
    now = [0.0]
    pace = Pace([1.0], clock=lambda: now[0])
    pace.begin(0)
    pace.at(0.8)
    now[0] = 1.0
    pace.at(0.9)
    assert pace.remaining() == pytest.approx(1.0)


def test_a_steps_line_tells_how_much_of_the_run_is_done() -> None:
    line = "DP: 2-way, Epoch [2/4], Step [15/30], Loss: 3.1, LR: 1e-05, Num tokens this step: 2691\n"
    assert share_of_run(line) == (pytest.approx(0.375), "3.1")
    assert share_of_run("Dataset: 30 rows") is None
