"""The piecewise linear schedule against its closed form."""

import pytest

from apps.training.schedules.piecewise_linear import PiecewiseLinear


def rates(total: int, lr: float = 1.0, **settings: float) -> list[float]:
    config = PiecewiseLinear.Config(**settings)
    return [PiecewiseLinear.learning_rate(step, total, lr, config) for step in range(1, total + 1)]


def test_one_rate_until_the_start_then_a_line_to_the_other() -> None:
    assert rates(7, lr=2.0, start_steps=3, final_ratio=0.5) == pytest.approx([2.0, 2.0, 2.0, 1.8, 1.6, 1.4, 1.2])


def test_the_second_rate_may_be_the_higher_one() -> None:
    assert rates(4, start_steps=2, final_ratio=4.0) == pytest.approx([1.0, 1.0, 2.0, 3.0])


def test_a_warm_up_comes_before() -> None:
    assert rates(6, warmup_steps=2, start_steps=3, final_ratio=0.0) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates(5, warmup_steps=3, start_steps=1, final_ratio=0.0) == pytest.approx([1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3])


def test_a_start_behind_the_end_is_a_constant_rate() -> None:
    assert rates(3, start_steps=9) == [1.0] * 3
    assert rates(1) == [1.0]
