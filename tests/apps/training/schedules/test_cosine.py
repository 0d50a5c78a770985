"""The cosine schedule against its closed form and against torch's, which computes each rate from the last."""

import pytest
import torch

from apps.training.schedules.cosine import Cosine


def rates(total: int, **settings: float) -> list[float]:
    config = Cosine.Config(**settings)
    return [Cosine.learning_rate(step, total, 1.0, config) for step in range(1, total + 1)]


def torchs(count: int, periods: int, floor: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=periods, eta_min=floor)
    found = []
    for _ in range(count):
        found.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return found


def test_half_a_cosine_from_the_peak_to_one_step_after_the_last() -> None:
    assert rates(3) == pytest.approx([1.0, 0.75, 0.25])  # cos of 0, 60 and 120 degrees


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_it_is_torchs_after_the_warm_up(floor: float) -> None:
    found = rates(50, warmup_steps=8, final_ratio=floor)
    assert found[:8] == pytest.approx([step / 8 for step in range(1, 9)])
    assert found[7:] == pytest.approx(torchs(43, 43, floor), rel=1e-12)


def test_the_final_ratio_lifts_the_end_of_the_curve() -> None:
    assert rates(3, final_ratio=0.5) == pytest.approx([1.0, 0.875, 0.625])
    assert rates(4, final_ratio=1.0) == pytest.approx([1.0] * 4)


def test_runs_of_one_step_and_warm_ups_longer_than_the_run_are_fine() -> None:
    assert rates(1) == [1.0]
    assert rates(2, warmup_steps=10) == pytest.approx([0.1, 0.2])
