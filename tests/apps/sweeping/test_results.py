"""What is read back from a run's folder, and when it counts as complete."""

from pathlib import Path

import pytest

from apps.sweeping.results import read_result
from tests.apps.sweeping.fakes import write_run


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    write_run(tmp_path, [5.0] * 10 + [3.0] * 49 + [1.0], dev_loss=2.0)
    result = read_result(tmp_path)
    assert result.train_loss == 1.0
    assert result.average_train_loss == pytest.approx((49 * 3 + 1) / 50)
    assert (result.dev_loss, result.perplexity, result.tokens, result.seconds) == (2.0, 7.3891, 6000, 30.0)
    assert result.is_complete(evaluated=True)


def test_a_run_that_was_stopped_is_not_complete(tmp_path: Path) -> None:
    write_run(tmp_path, [3.0, 2.0], steps=1_000)
    assert not read_result(tmp_path).is_complete(evaluated=True)


def test_a_run_without_the_evaluation_it_should_have_is_not_complete(tmp_path: Path) -> None:
    write_run(tmp_path, [3.0], dev_loss=None)
    assert not read_result(tmp_path).is_complete(evaluated=True)
    assert read_result(tmp_path).is_complete(evaluated=False)


def test_a_run_without_its_report_is_not_complete(tmp_path: Path) -> None:
    write_run(tmp_path, [3.0])
    (tmp_path / "report.html").unlink()
    assert not read_result(tmp_path).is_complete(evaluated=True)


def test_nothing_and_a_row_cut_short_are_no_result(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    write_run(tmp_path, [3.0, 2.0])
    metrics = tmp_path / "per_step_metrics.csv"
    metrics.write_text(metrics.read_text()[:-30])
    assert read_result(tmp_path) is None
