"""Counting steps and epochs, against walking through them one by one."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.config_schema import TrainingConfig
from apps.training.steps import StepCount, accumulation_steps, count_steps
from backends.errors import UserError

SIZES = {"N": 1_000_003, "N_non_embedding": 600_001}


def counted(steps_per_epoch: int, *, tokens_per_step: int = 1024, **settings: Any) -> StepCount:
    return count_steps(steps_per_epoch, TrainingConfig(**settings), tokens_per_step=tokens_per_step, sizes=SIZES)


def test_whole_epochs() -> None:
    count = counted(2622, num_epochs=2)
    assert count.total == 5244
    assert count.position(1) == (1, 2, 1, 2622)
    assert count.position(5244) == (2, 2, 2622, 2622)


def test_max_steps_wins_over_epochs_and_may_pass_through_several() -> None:
    count = counted(30, num_epochs=1, max_steps=100)
    assert count.position(30) == (1, 4, 30, 30)
    assert count.position(31) == (2, 4, 1, 30)
    assert count.position(100) == (4, 4, 10, 10)
    assert counted(30, num_epochs=3, max_steps=5).position(5) == (1, 1, 5, 5)


def test_a_token_budget_makes_the_steps_that_see_at_least_as_many() -> None:
    count = counted(30, token_budget="22*N/100", num_epochs=3)
    assert count.budget.tokens == 220_001  # 22 × 1,000,003 = 22,000,066; a hundredth of it, rounded up
    assert count.total == 215  # 214 × 1024 = 219,136 tokens would be too few
    assert count.num_epochs == 8
    assert str(count.budget) == "Token budget: 22*N/100 = 220,001 tokens → 215 steps of 1,024 tokens"
    assert counted(30, token_budget="N_non_embedding").total == 586
    assert counted(30, token_budget="2048").total == 2
    assert counted(30, token_budget="2049").total == 3
    assert counted(30, token_budget="1").total == 1
    assert counted(30, token_budget="1e9", tokens_per_step=2**21).total == 477


def test_a_budget_that_comes_to_nothing_for_this_model_is_refused() -> None:
    message = "training.token_budget=N-2e6: it comes to -999997 tokens"
    with pytest.raises(UserError, match=re.escape(message)):
        counted(30, token_budget="N-2e6")


@given(st.integers(1, 10**12), st.integers(1, 10**7))
def test_the_steps_of_a_budget_are_the_fewest_that_are_enough(tokens: int, tokens_per_step: int) -> None:
    steps = counted(30, token_budget=str(tokens), tokens_per_step=tokens_per_step).total
    assert (steps - 1) * tokens_per_step < tokens <= steps * tokens_per_step


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 4, "global_batch_size": 4},
            "A step of the run in iter_2 has 4 rows, which is not a multiple of the 8 rows that 2 workers take at a "
            "time (training.batch_size=4 each). Start another number of workers, or give other rows with "
            "checkpoint.overwrite_config=true.",
        ),
        (
            {"batch_size": 4, "global_batch_size": 16, "gradient_accumulation_steps": 3},
            "training.gradient_accumulation_steps=3 was given too. Leave it out, or give it with "
            "checkpoint.overwrite_config=true.",
        ),
    ],
)
def test_a_global_batch_that_a_checkpoint_says_is_not_called_given(settings, message):
    """It was: 'training.global_batch_size=4 … Change one of them', and each change was refused in its turn."""
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        accumulation_steps(TrainingConfig(**settings), 2, kept_from=Path("iter_2"))
    assert "global_batch_size" not in str(raised.value)


def test_one_worker_is_one_worker():
    with pytest.raises(UserError, match="that 1 worker takes at a time"):
        accumulation_steps(TrainingConfig(batch_size=4, global_batch_size=30), 1)
