"""The numbers of a comparison of targets, from results that are known."""

import math

import pytest
import torch

from apps.parity.target_report import COLUMNS, gradient_rows, summary, table
from apps.parity.targets import TargetResult, distance


def result(name: str, losses: list[float], scale: float, shift: float, seconds: float) -> TargetResult:
    """Gradients `a` scaled, `b` and the weights shifted in their first element."""
    b = torch.tensor([3.0, 4.0])
    b[0] += shift
    return TargetResult(name, losses, {"a": torch.full((3,), scale), "b": b}, {"a": torch.ones(3), "b": b}, seconds)


def test_errors_are_relative_to_the_reference() -> None:
    results = [result("eager", [4.0, 2.0], 1.0, 0.0, 0.5), result("other", [4.0, 2.5], 1.1, 5.0, 2.0)]
    first, second = (dict(zip(COLUMNS, row, strict=True)) for row in summary(results))
    assert (first["worst_loss_error"], first["worst_gradient_error"], first["step_time_ratio"]) == (0, 0, 1)
    assert second["worst_loss_error"] == pytest.approx(0.25)
    assert (second["first_loss"], second["last_loss"]) == (4.0, 2.5)
    assert second["worst_gradient"] == "b"
    assert second["worst_gradient_error"] == pytest.approx(1.0)
    assert second["median_gradient_error"] == pytest.approx((0.1 + 1.0) / 2)
    assert second["worst_weight_error"] == pytest.approx(1.0)
    assert second["step_time_ratio"] == 4.0
    head, reference, other = table(results).rows
    assert len(head) == len(reference) == len(other)
    assert list(reference[2:6]) == ["–"] * 4
    assert other[2] == "0.25"
    rows = list(gradient_rows(results))
    assert [row[:2] for row in rows[1:]] == [("other", "a"), ("other", "b")]
    assert rows[2][2] == pytest.approx(1.0)


def test_a_reference_of_zeros() -> None:
    zeros = torch.zeros(3)
    assert distance(zeros, zeros) == 0
    assert distance(torch.ones(3), zeros) == math.inf
