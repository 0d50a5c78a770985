"""At most so many records a second: by a clock that the test moves."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.training.reporting.pace import Pace, Report


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def steps(reports: list[Report]) -> list[int]:
    return [report.step for report in reports]


def test_slow_steps_are_all_sent_at_once() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    for step in range(1, 5):
        assert steps(pace.offer(Report(step, {"loss": 1.0}))) == [step]
        clock.sleep(0.5)
    assert pace.last(clock.sleep) == []
    assert pace.left_out == 0


def test_of_quick_steps_the_newest_waits_and_the_last_is_always_sent() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    sent = []
    for step in range(1, 31):
        sent += steps(pace.offer(Report(step, {})))
        clock.sleep(0.01)
    assert sent == [1, 10, 20]
    assert steps(pace.last(clock.sleep)) == [30]
    assert pace.left_out == 30 - 4


def test_a_record_with_more_to_say_is_not_left_out_for_one_with_less() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    sent = []
    for step in range(1, 31):
        sent += pace.offer(Report(step, {"loss": 1.0}, importance=int(step % 10 == 4)))
        clock.sleep(0.01)
    assert {4, 14, 24} <= {report.step for report in [*sent, *pace.last(clock.sleep)]}


def test_two_reports_of_a_step_that_waits_are_one() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    pace.offer(Report(1, {"loss": 3.0}))
    assert pace.offer(Report(2, {"loss": 2.0})) == []
    assert pace.offer(Report(2, {"evaluation_loss": 1.5}, importance=2)) == []
    assert pace.last(clock.sleep) == [Report(2, {"loss": 2.0, "evaluation_loss": 1.5}, importance=2)]
    assert pace.left_out == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.4), st.integers(0, 2)), min_size=1, max_size=60))
def test_in_no_second_more_are_sent_than_allowed(offers: list[tuple[float, int]]) -> None:
    clock, times, sent = Clock(), [], []
    pace = Pace(10, clock)
    for step, (pause, importance) in enumerate(offers, 1):
        clock.sleep(pause)
        now = pace.offer(Report(step, {}, importance))
        times += [clock.now] * len(now)
        sent += steps(now)
    now = pace.last(clock.sleep)
    times += [clock.now] * len(now)
    sent += steps(now)
    assert sent == sorted(set(sent))
    assert len(sent) + pace.left_out == len(offers)
    for start in times:
        assert sum(start <= time < start + 0.999 for time in times) <= 10
    assert all(after - before >= 0.0999 for before, after in pairwise(times))


def test_a_rate_is_records_a_second() -> None:
    assert Pace(4).interval == pytest.approx(0.25)
