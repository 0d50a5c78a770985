"""Skipped steps in a row, and what is said of too many."""

from dataclasses import replace

import pytest

from apps.training.nonfinite import ended_over_skipped, skipped_in_a_row
from apps.training.reporting.records import StepRecord

RECORD = StepRecord(step=1, epoch=1, loss=2.0, lr=1e-3, num_tokens=8, num_counted=6, seconds=0.5, grad_norm=None)


def records(skipped: str) -> list[StepRecord]:
    return [replace(RECORD, step=step, skipped=int(flag)) for step, flag in enumerate(skipped, start=1)]


@pytest.mark.parametrize(("skipped", "count"), [("", 0), ("0", 0), ("1", 1), ("110", 0), ("1011", 2), ("111", 3)])
def test_only_the_last_steps_count(skipped: str, count: int) -> None:
    assert skipped_in_a_row(records(skipped)) == count


def test_too_many_are_told_of_once_and_by_one_worker(capsys: pytest.CaptureFixture[str]) -> None:
    assert not ended_over_skipped(records("0110"), 2, tell=True)
    assert not ended_over_skipped(records("011"), 3, tell=True)
    assert not ended_over_skipped(records("111"), 0, tell=True)
    assert ended_over_skipped(records("011"), 2, tell=False)
    assert capsys.readouterr().err == ""
    assert ended_over_skipped(records("011"), 2, tell=True)
    error = capsys.readouterr().err
    assert error.startswith("error: The loss or a gradient was NaN or infinite in 2 steps in a row, up to step 3 at ")
    assert error.count("\n") == 1
