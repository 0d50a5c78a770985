"""The linear schedule against its closed form."""

import pytest

from apps.training import schedules
from apps.training.schedules.linear import Linear
from backends.errors import UserError


def rates(total: int, **settings: float) -> list[float]:
    config = Linear.Config(**settings)
    return [Linear.learning_rate(step, total, 1.0, config) for step in range(1, total + 1)]


def test_without_warm_up_it_falls_from_the_peak_and_never_reaches_zero() -> None:
    assert rates(4) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_warm_up_starts_above_zero_and_meets_the_peak_at_its_last_step() -> None:
    assert rates(8, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_flat_steps_stay_at_the_peak_before_the_line() -> None:
    assert rates(8, warmup_steps=2, flat_steps=3) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates(4, flat_steps=9) == [1.0] * 4


def test_the_final_ratio_lifts_the_end_of_the_line() -> None:
    assert rates(4, final_ratio=0.5) == pytest.approx([1.0, 0.875, 0.75, 0.625])
    assert rates(5, final_ratio=1.0) == pytest.approx([1.0] * 5)


def test_runs_of_one_step_and_warm_ups_longer_than_the_run_are_fine() -> None:
    assert rates(1) == [1.0]
    assert rates(1, warmup_steps=1) == [1.0]
    assert rates(2, warmup_steps=10) == pytest.approx([0.1, 0.2])


def test_schedules_are_found_by_file_name() -> None:
    assert schedules.available() == ("constant", "cosine", "linear", "piecewise_linear", "trapezoid")
    assert schedules.load("linear") is Linear
    with pytest.raises(UserError, match=r"Unknown schedule 'liner'\. Did you mean 'linear'\?"):
        schedules.load("liner")
