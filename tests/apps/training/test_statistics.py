"""From the table of a measured step to named numbers: against sums written out here."""

import math

import pytest
import torch

from apps.training.reporting.records import StepRecord
from apps.training.statistics import RunStatistics, part_of, rows_by
from compiled.measuring import COLUMNS, Measuring
from compiled.reduction import OneWorker


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(step=step, epoch=1, loss=loss, lr=0.1, num_tokens=8, num_counted=6, seconds=2.0, grad_norm=None)


def step(statistics: RunStatistics, number: int, gradients: dict[str, list[float]], loss: float) -> dict[str, float]:
    """A step of x ← x − g."""
    measuring = statistics.measuring
    statistics.begin(number)
    measuring.start()
    given = {name: torch.tensor(values, dtype=torch.float64) for name, values in gradients.items()}
    measuring.before_update(given)
    for name, gradient in given.items():
        measuring.weights[name].sub_(gradient)
    measuring.after_update(given)
    measuring.count_hits(torch.tensor(0.25))
    measuring.finish(OneWorker())
    statistics.tell(record(number, loss), statistics.copy(reading=0.5))
    return statistics.values_of(number)


def statistics_of(every: int) -> RunStatistics:
    weights = {name: torch.ones(2, dtype=torch.float64) for name in ("model.layers.0.w", "model.layers.0.v", "lm_head")}
    measuring = Measuring(list(weights), weights, every, torch.device("cpu"))
    return RunStatistics(measuring, rows_by([part_of(name) for name in weights]))


def test_groups_products_and_running_sums() -> None:
    statistics = statistics_of(1)
    first = {"model.layers.0.w": [3.0, 0.0], "model.layers.0.v": [0.0, 4.0], "lm_head": [12.0, 0.0]}
    values = step(statistics, 1, first, loss=5.0)
    assert values["grad_l2/layers.0"] == 5.0
    assert values["grad_l2/all"] == 13.0
    assert (values["grad_l1/all"], values["grad_linf/all"], values["param_l1/all"]) == (19.0, 12.0, 6.0)
    assert values["update_l2/lm_head"] == 12.0
    assert values["accuracy"] == 0.25
    assert not [name for name in values if "last" in name or "loss" in name]  # there is no last step
    second = {"model.layers.0.w": [1.0, 1.0], "model.layers.0.v": [1.0, 1.0], "lm_head": [1.0, 1.0]}
    values = step(statistics, 2, second, loss=4.5)
    assert values["loss_change"] == -0.5
    assert values["dot_last_grad/all"] == 19.0
    assert values["dot_last_update/all"] == -19.0
    assert values["cos_last_grad/all"] == pytest.approx(19.0 / (math.sqrt(6.0) * 13.0))
    assert values["cos_last_update/layers.0"] == pytest.approx(-7.0 / (2.0 * 5.0))
    values = step(statistics, 3, second, loss=4.75)
    assert values["sum_loss_change"] == -0.25
    assert values["sum_dot_last_grad/all"] == 19.0 + 6.0
    assert values["sum_cos_last_update/layers.0"] == pytest.approx(-0.7 - 1.0)
    assert values["seconds/data"] == 0.5
    assert values["share/data"] == 0.25
    assert statistics.values_of(2) == {}


def test_a_gradient_that_is_not_finite_is_counted_and_stays_with_its_group() -> None:
    values = step(
        statistics_of(1),
        1,
        {"model.layers.0.w": [math.nan, math.inf], "model.layers.0.v": [1.0, 1.0], "lm_head": [1.0, 1.0]},
        loss=1.0,
    )
    assert (values["grad_nonfinite/layers.0"], values["grad_nonfinite/lm_head"]) == (2, 0)
    assert math.isnan(values["grad_l2/all"])
    assert values["grad_l2/lm_head"] == pytest.approx(math.sqrt(2.0))


def test_steps_in_between_are_not_measured_but_their_loss_is_the_last_one() -> None:
    statistics = statistics_of(3)
    ones = {"model.layers.0.w": [1.0, 1.0], "model.layers.0.v": [1.0, 1.0], "lm_head": [1.0, 1.0]}
    found = [step(statistics, number, ones, loss=float(number**2)) for number in range(1, 7)]
    assert [bool(values) for values in found] == [False, False, True] * 2
    assert found[2]["loss_change"] == 9 - 4
    assert found[5]["sum_loss_change"] == (9 - 4) + (36 - 25)
    assert found[2]["dot_last_grad/all"] == 6.0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.11.mlp.up_proj.weight", "layers.11"),
        ("model.layers.0.self_attn.q_proj.lora_A", "layers.0"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("transformer.h.3.ln_1.bias", "transformer.h.3"),
        ("scale", "scale"),
    ],
)
def test_the_part_of_a_parameter(name: str, part: str) -> None:
    assert part_of(name) == part


def test_the_columns_have_a_name_each() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert rows_by(["a", "b", "a"]) == {"all": [0, 1, 2], "a": [0, 2], "b": [1]}
