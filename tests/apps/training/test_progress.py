"""The progress line: what it shows, when, and that it never tears the lines printed between."""

import io

import pytest

from apps.training.progress import CLEAR, Progress, clock_time


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_log_gets_one_plain_line_every_ten_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(100, "Training", "steps", stream=stream, clock=clock)
    for _ in range(25):
        clock.now += 1.0
        progress.update(1, loss="5.1", tokens_per_second="2.0k")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == "Training 10/100 steps   10%  ETA 1:30  loss 5.1  tokens per second 2.0k"
    assert CLEAR not in stream.getvalue()


def test_the_eta_follows_the_recent_pace_not_a_slow_start(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(1000, "Training", "steps", mode="on", stream=stream, clock=clock)
    clock.now += 1000.0
    progress.update(1)
    for _ in range(199):
        clock.now += 1.0
        progress.update(1)
    assert "ETA 13:20" in stream.getvalue().split(CLEAR)[-1]


def test_lines_printed_while_the_live_line_is_up_come_out_whole(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    progress = Progress(10, "Training", mode="on", stream=stream, clock=clock)
    clock.now += 1.0
    progress.update(1)
    progress.write("Epoch [1/1]")
    assert capsys.readouterr().out == "Epoch [1/1]\n"
    assert stream.getvalue().endswith(CLEAR)


def test_off_shows_nothing_and_short_work_leaves_no_trace_in_a_log(clock: Clock) -> None:
    for mode in ("off", "auto"):
        stream = io.StringIO()
        with Progress(10, "Loading", mode=mode, stream=stream, clock=clock) as progress:
            clock.now += 60.0 if mode == "off" else 1.0
            progress.update(10)
        assert stream.getvalue() == ""


def test_the_last_line_says_how_long_it_took(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(None, "Reading", "rows", stream=stream, clock=clock) as progress:
        clock.now += 75.0
        progress.update(1234)
    assert stream.getvalue().splitlines()[-1] == "Reading 1,234 rows  in 1:15"


def test_clock_time() -> None:
    assert [clock_time(s) for s in (0.4, 7, 750, 11100)] == ["0:00", "0:07", "12:30", "3:05:00"]
