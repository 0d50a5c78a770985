"""The constant schedule against its closed form."""

import pytest

from apps.training.schedules.constant import Constant


def rates(total: int, warmup_steps: int = 0) -> list[float]:
    config = Constant.Config(warmup_steps=warmup_steps)
    return [Constant.learning_rate(step, total, 2.0, config) for step in range(1, total + 1)]


def test_every_step_has_the_peak() -> None:
    assert rates(5) == [2.0] * 5


def test_a_warm_up_starts_above_zero_and_meets_the_peak_at_its_last_step() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert rates(2, warmup_steps=10) == pytest.approx([0.2, 0.4])
