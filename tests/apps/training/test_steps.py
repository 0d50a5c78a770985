"""Counting steps and epochs, against walking through them one by one."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.config_schema import TrainingConfig
from apps.training.steps import StepCount, accumulation_steps, count_steps
from backends.errors import UserError


def test_whole_epochs() -> None:
    count = count_steps(2622, num_epochs=2, max_steps=None)
    assert count.total == 5244
    assert count.position(1) == (1, 2, 1, 2622)
    assert count.position(5244) == (2, 2, 2622, 2622)


def test_max_steps_wins_over_epochs_and_may_pass_through_several() -> None:
    count = count_steps(30, num_epochs=1, max_steps=100)
    assert count.position(30) == (1, 4, 30, 30)
    assert count.position(31) == (2, 4, 1, 30)
    assert count.position(100) == (4, 4, 10, 10)
    assert count_steps(30, num_epochs=3, max_steps=5).position(5) == (1, 1, 5, 5)


@given(st.integers(1, 12), st.integers(1, 40))
def test_positions_equal_a_walk_through_the_steps(steps_per_epoch: int, total: int) -> None:
    epochs = [step // steps_per_epoch + 1 for step in range(total)]
    for step, epoch in enumerate(epochs, start=1):
        here = StepCount(steps_per_epoch, total).position(step)
        assert here == (epoch, epochs[-1], epochs[:step].count(epoch), epochs.count(epoch))


@pytest.mark.parametrize(
    ("settings", "world_size", "expected"),
    [
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, 2, 3),
        ({"batch_size": 4, "global_batch_size": 32}, 1, 8),
        ({"batch_size": 4, "global_batch_size": 32}, 4, 2),
        ({"batch_size": 4, "global_batch_size": 32, "gradient_accumulation_steps": 2}, 4, 2),
    ],
)
def test_the_microbatches_of_a_worker_make_the_global_batch(settings, world_size, expected):
    assert accumulation_steps(TrainingConfig(**settings), world_size) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 4, "global_batch_size": 30}, "is not a multiple of the 8 rows that 2 workers take at a time"),
        (
            {"batch_size": 4, "global_batch_size": 32, "gradient_accumulation_steps": 3},
            "makes 4 microbatches, but training.gradient_accumulation_steps=3 was given too",
        ),
    ],
)
def test_a_global_batch_the_workers_cannot_make_is_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        accumulation_steps(TrainingConfig(**settings), 2)
