"""summary.txt: the reference's lines first, then the model's parameters as JSON."""

import json
import math

import pytest

from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.reporting.summary import Totals, best_and_smoothed, headline, loss_lines, summary_text

STEPS = [
    StepRecord(step=i, epoch=1, loss=5.0 - i, lr=1e-3, num_tokens=100, num_counted=90, seconds=0.5, grad_norm=1.0)
    for i in (1, 2)
]


def test_the_summary_has_totals_losses_and_json() -> None:
    text = summary_text("Number of epochs: 1", STEPS, Evaluation(2, 2.5, 10), 6.25, "* dense", {"hidden_size": 4})
    head, _, parameters = text.partition("\n\nModel parameters:\n")
    assert head.splitlines() == [
        "Number of epochs: 1",
        "Total tokens seen: 200",
        "Tokens per second: 200.00",
        "Average time per step: 0.500000",
        "Last training loss: 3.0000",
        "Best training loss: 3.0000 (step 2)",
        "Smoothed training loss: 3.0000 (mean of the last 1 steps)",
        "Evaluation loss: 2.5000, Perplexity: 12.1825",
        "Unigram entropy of the dataset: 6.2500",
        "",
        "Layers and backends:",
        "* dense",
    ]
    assert json.loads(parameters) == {"hidden_size": 4}


def test_an_interrupted_run_has_a_summary_too() -> None:
    assert "Evaluation" not in summary_text("", STEPS, None, None, "", {})
    assert Totals.of([]).tokens_per_second == 0.0
    assert headline([], None, None, 7) == {
        "tokens seen": "0",
        "tokens per second": "0",
        "training time": "0:00",
        "parameters": "7",
    }


def test_speed_is_tokens_over_the_time_of_the_steps() -> None:
    assert Totals.of(STEPS).tokens_per_second == pytest.approx(200.0)
    assert Totals.of(STEPS).seconds_per_step == pytest.approx(0.5)


def test_best_last_and_smoothed_are_three_numbers() -> None:
    losses = [5.0 - 0.01 * step for step in range(100)] + [1.5, math.nan, 2.5, math.inf, 3.5]
    assert best_and_smoothed(losses) == (1.5, 100, pytest.approx((1.5 + 2.5 + 3.5) / 3), 5)
    assert best_and_smoothed([2.0]) == (2.0, 0, 2.0, 1)
    assert math.isnan(best_and_smoothed([math.nan])[0])
    assert loss_lines([]) == []
