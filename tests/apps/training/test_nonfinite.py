"""Skipped steps in a row, and what is said of too many."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from apps.training.nonfinite import are_finite, ended_over_skipped, skipped_in_a_row
from apps.training.reporting.records import StepRecord

needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -1.0])
def test_one_weight_that_is_no_number_is_found(device: str, dtype: torch.dtype, value: float) -> None:
    model = nn.ModuleList([nn.Linear(7, 5, dtype=dtype), nn.LayerNorm(3)]).to(device)
    with torch.no_grad():
        model[0].weight[4, 6] = value
        model[1].weight[0] = torch.finfo(torch.float32).max
    assert bool(are_finite(model)) == (abs(value) <= 1)
