"""What the pictures show of trials that are done."""

from pathlib import Path
from typing import Any

import pytest

from apps.sweeping.comparison import compare, is_log_spaced, loss_curves
from apps.sweeping.grid import expand
from apps.sweeping.page import render
from apps.sweeping.results import read_result
from apps.sweeping.trials import Trial, make_trials
from tests.apps.sweeping.fakes import write_run


def finished(axes: dict[str, Any], folder: Path) -> list[Trial]:
    """Trials whose dev losses are 1, 2, 3, … in the grid's order."""
    trials = make_trials(expand(axes, "grid"), [], folder)
    for number, trial in enumerate(trials, start=1):
        write_run(trial.folder, [5.0, 4.0], dev_loss=number)
        trial.status, trial.result = "done", read_result(trial.folder)
    return trials


def test_loss_stands_over_the_first_numeric_setting(tmp_path: Path) -> None:
    rules = {"dense": [], "mlp": [{"match": "*.mlp.*", "use": "dense"}]}
    trials = finished({"backend.rules": rules, "optimizer.lr": [1e-2, 1e-4, 1e-3]}, tmp_path)
    comparison = compare(trials)
    assert (comparison.key, comparison.loss, comparison.is_log, comparison.names) == (
        *("optimizer.lr", "dev loss", True, ()),
    )
    assert {line.label: line.points for line in comparison.series} == {
        "rules dense": [(1e-4, 2.0), (1e-3, 3.0), (1e-2, 1.0)],
        "rules mlp": [(1e-4, 5.0), (1e-3, 6.0), (1e-2, 4.0)],
    }


def test_without_numbers_the_names_stand_side_by_side(tmp_path: Path) -> None:
    trials = finished({"checkpoint.config_name": ["demo", "clm-60m"]}, tmp_path)
    comparison = compare(trials)
    assert comparison.names == ("demo", "clm-60m")
    assert comparison.series[0].points == [(0.0, 1.0), (1.0, 2.0)]
    assert "clm-60m</text>" in render(trials, title="Sizes", subtitle="here")


def test_what_is_not_done_is_not_compared_but_its_curve_is_drawn(tmp_path: Path) -> None:
    trials = finished({"optimizer.lr": [1e-2, 1e-4]}, tmp_path)
    trials[1].status = "stopped"
    assert [line.points for line in compare(trials).series] == [[(1e-2, 1.0)]]
    assert [line.points for line in loss_curves(trials)] == [[(1, 5.0), (2, 4.0)]] * 2
    for trial in trials:
        trial.status, trial.result = "failed", None
        trial.error = "<no room>"
    assert compare(trials) is None
    assert "&lt;no room&gt;" in render(trials, title="Nothing", subtitle="here")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-5, 1e-4, 1e-3], True),
        ([1e-5, 3e-5, 1e-4], True),
        ([4, 8, 16, 32], True),
        ([4, 6, 8, 10], False),
        ([1, 2], False),
        ([1e-4, 1e-3], True),
        ([0, 1, 10], False),
        ([5], False),
    ],
)
def test_an_axis_is_logarithmic_where_values_lie_evenly_on_one(values: list[float], expected: bool) -> None:
    assert is_log_spaced(values) is expected
