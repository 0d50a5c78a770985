"""The trapezoid schedule against its closed form."""

import pytest

from apps.training.schedules.trapezoid import Trapezoid


def rates(total: int, **settings: float) -> list[float]:
    config = Trapezoid.Config(**settings)
    return [Trapezoid.learning_rate(step, total, 1.0, config) for step in range(1, total + 1)]


def test_warm_up_flat_and_a_line_over_the_last_steps() -> None:
    assert rates(10, warmup_steps=4, decay_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_fifth_of_the_run_falls_unless_told_otherwise() -> None:
    assert rates(15) == pytest.approx([1.0] * 12 + [0.75, 0.5, 0.25])
    assert rates(5, decay_steps=0) == [1.0] * 5


def test_the_final_ratio_lifts_the_end_of_the_line() -> None:
    assert rates(4, decay_steps=1, final_ratio=0.5) == pytest.approx([1.0, 1.0, 1.0, 0.75])


def test_a_decay_longer_than_the_run_leaves_the_warm_up_as_it_is() -> None:
    assert rates(5, warmup_steps=2, decay_steps=100) == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])
    assert rates(4, decay_steps=100) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(2, warmup_steps=10, decay_steps=100) == pytest.approx([0.1, 0.2])
    assert rates(1) == [1.0]
