"""log.csv: every number at once, columns that come later, a step that comes twice, a run that was killed."""

import csv
from pathlib import Path

from apps.training.loggers.csv_logger import CsvLogger
from tests.apps.training.loggers.runs import a_run


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_is_in_the_file_at_once_with_every_bit(tmp_path: Path) -> None:
    logger = CsvLogger(a_run(tmp_path))
    logger.log(1, {"loss": 1 / 3, "lr": 1e-5})
    assert rows(tmp_path) == [{"step": "1", "loss": repr(1 / 3), "lr": "1e-05"}]  # not closed: a crash loses nothing
    logger.close(failed=True)


def test_a_number_that_comes_later_has_a_column_from_then_on(tmp_path: Path) -> None:
    logger = CsvLogger(a_run(tmp_path))
    logger.log(1, {"loss": 3.0})
    logger.log(2, {"loss": 2.0, "norm, of all": 9.0})
    logger.log(3, {"loss": 1.0})
    logger.close(failed=False)
    assert [list(row.values()) for row in rows(tmp_path)] == [["1", "3.0", ""], ["2", "2.0", "9.0"], ["3", "1.0", ""]]
    assert list(rows(tmp_path)[0]) == ["step", "loss", "norm, of all"]


def test_a_step_that_comes_twice_has_one_row(tmp_path: Path) -> None:
    logger = CsvLogger(a_run(tmp_path))
    logger.log(1, {"loss": 3.25})
    logger.log(1, {"evaluation_loss": 2.5})
    logger.log(2, {"loss": 3.0})
    logger.log(2, {"evaluation_loss": 2.25})
    logger.log(3, {"loss": 2.0})
    logger.close(failed=False)
    assert (tmp_path / "log.csv").read_text() == "step,loss,evaluation_loss\n1,3.25,2.5\n2,3.0,2.25\n3,2.0,\n"


def test_a_resumed_log_has_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    """Killed after step 5, in the middle of a row; goes on after step 3."""
    logger = CsvLogger(a_run(tmp_path))
    for step in range(1, 6):
        logger.log(step, {"loss": 1 / step})
    logger.close(failed=False)
    whole = (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv").write_bytes(whole[:-9])
    again = CsvLogger(a_run(tmp_path, resumed_step=3))
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]
    for step in (4, 5):
        again.log(step, {"loss": 1 / step})
    again.close(failed=False)
    assert (tmp_path / "log.csv").read_bytes() == whole


def test_the_last_step_of_a_resumed_log_may_come_once_more(tmp_path: Path) -> None:
    """Its evaluation was stopped, and is made up by the next start; also with a number that is new to the file."""
    logger = CsvLogger(a_run(tmp_path))
    logger.log(1, {"loss": 3.0, "lr": 0.5})
    logger.log(2, {"loss": 2.0})
    logger.close(failed=False)
    again = CsvLogger(a_run(tmp_path, resumed_step=2))
    again.log(2, {"evaluation_loss": 1.5})
    again.log(3, {"loss": 1.0})
    again.close(failed=False)
    assert (tmp_path / "log.csv").read_text() == "step,loss,lr,evaluation_loss\n1,3.0,0.5,\n2,2.0,,1.5\n3,1.0,,\n"


def test_another_run_starts_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n1,3.0\n")
    CsvLogger(a_run(tmp_path)).close(failed=False)
    assert (tmp_path / "log.csv").read_text() == "step\n"
