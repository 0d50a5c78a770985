"""Loggers are found by file name, and one whose package is missing is refused before anything is done."""

import re
from pathlib import Path

import pytest

from apps.training import loggers
from apps.training.config import parse
from apps.training.loggers._base import flat
from backends.errors import UserError


def test_the_four_are_found_by_their_files() -> None:
    assert {"csv", "tensorboard", "wandb", "mlflow"} <= set(loggers.available())
    for name in loggers.available():
        assert issubclass(loggers.load(name), loggers.RunLogger)


def test_a_new_file_is_a_new_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paper_logger.py").write_text(
        "from apps.training.loggers import RunLogger\nclass Paper(RunLogger):\n    package = 'no_such_package_here'\n"
    )
    monkeypatch.setattr(loggers, "__path__", [str(tmp_path), *loggers.__path__])
    assert loggers.available() == ("paper",)
    with pytest.raises(UserError) as error:
        loggers.require_installed(["paper"])
    assert str(error.value) == (
        "logging.report_to has paper, and its package no_such_package_here is not installed. "
        "Expected it beside this program: pip install 'substrate[paper]'."
    )


def test_a_folder_that_a_run_left_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package_of_nobody").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(loggers.load("csv"), "package", "a_package_of_nobody")
    with pytest.raises(UserError, match="is not installed"):
        loggers.require_installed(["csv"])


def test_a_wrong_name_is_an_error_of_the_command_line() -> None:
    with pytest.raises(UserError, match=re.escape("Unknown logger in logging.report_to 'tensorbord'. Did you mean")):
        parse(["command=run", "logging.report_to=[csv, tensorbord]"])


def test_an_installed_logger_is_accepted_by_every_command() -> None:
    assert parse(["command=run", "logging.report_to=[csv]"]).logging.report_to == ["csv"]
    assert parse(["command=compile", "logging.report_to=[wandb]"]).logging.report_to == ["wandb"]  # not used there


def test_every_extra_is_declared_under_the_loggers_name() -> None:
    project = (Path(loggers.__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    for name in loggers.available():
        package = loggers.load(name).package
        assert package is None or re.search(rf'^{name} = \["{package}[><=]', project, re.MULTILINE)


def test_nested_settings_by_dotted_name() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
