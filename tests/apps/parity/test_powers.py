"""Relative error and SNR against their closed forms, and at their ends."""

import math

import pytest
import torch

from apps.parity.powers import Error, ErrorSum


def test_the_error_is_that_of_all_elements_of_all_batches() -> None:
    total = ErrorSum()
    total.add([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.5])])
    total.add([torch.tensor([[12.0]]), torch.tensor([0.0])], [torch.tensor([[12.0]]), torch.tensor([1.2])])
    error = total.error()
    assert error is not None
    assert error.relative == pytest.approx(math.sqrt(0.25 + 1.44) / 13)
    assert error.snr_db == pytest.approx(10 * math.log10(169 / 1.69))


@pytest.mark.parametrize("bits", range(1, 12))
def test_half_the_error_is_six_decibels_more(bits: int) -> None:
    x = torch.randn(64, dtype=torch.float64)
    total = ErrorSum()
    total.add([x], [x * (1 + 2.0**-bits)])
    error = total.error()
    assert error is not None
    assert error.snr_db == pytest.approx(bits * 20 * math.log10(2))


def test_narrow_tensors_are_subtracted_in_float32() -> None:
    reference, other = (
        torch.full((1000,), 256.0, dtype=torch.bfloat16),
        torch.full((1000,), 258.0, dtype=torch.bfloat16),
    )
    total = ErrorSum()
    total.add([reference], [other])
    assert total.error() == Error(1000 * 256.0**2, pytest.approx(4000.0))


@pytest.mark.parametrize(
    ("error", "relative", "snr"),
    [
        (Error(1.0, 0.0), 0.0, math.inf),
        (Error(0.0, 0.0), 0.0, math.inf),
        (Error(0.0, 1.0), math.inf, -math.inf),
        (Error(1.0, math.inf), math.inf, -math.inf),
    ],
)
def test_the_ends(error: Error, relative: float, snr: float) -> None:
    assert (error.relative, error.snr_db) == (relative, snr)


def test_what_is_not_a_number_stays_so() -> None:
    total = ErrorSum()
    total.add([torch.ones(2)], [torch.tensor([1.0, math.nan])])
    error = total.error()
    assert error is not None
    assert math.isnan(error.relative)
    assert math.isnan(error.snr_db)


def test_nothing_added_is_no_error() -> None:
    assert ErrorSum().error() is None
