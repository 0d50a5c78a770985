"""Counting steps and epochs, against walking through them one by one."""

from hypothesis import given
from hypothesis import strategies as st

from apps.training.steps import StepCount, count_steps


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
