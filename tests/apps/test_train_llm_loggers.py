"""`logging.report_to` from end to end: what arrives, what survives a resume, and that nothing stops a run."""

import csv
from pathlib import Path

import pytest

from apps.train_llm import program
from apps.training import loggers
from apps.training.cli import run_main


def run(settings: dict[str, str], **changes: str) -> int:
    changed = settings | {key.replace("__", "."): value for key, value in changes.items()}
    return run_main(program, [f"{key}={value}" for key, value in changed.items()])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


ALL = {"logging__records_per_second": "1e6", "logging__report_to": "[csv, tensorboard]"}


def test_two_loggers_are_told_what_the_run_itself_writes(settings: dict[str, str], tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(settings, training__eval_steps="2", **ALL) == 0
    own, logged = table(tmp_path / "out/per_step_metrics.csv"), table(tmp_path / "out/log.csv")
    assert [row["loss"] for row in logged] == [row["Step Loss"] for row in own]
    assert [float(row["grad_norm"]) for row in logged] == [float(row["Gradient Norm"]) for row in own]
    assert [bool(row["evaluation_loss"]) for row in logged] == [False, True, False, True]
    tokens = [int(row["Tokens in Step"]) for row in own]
    assert [float(row["tokens"]) for row in logged] == [sum(tokens[: index + 1]) for index in range(4)]
    for row in logged:
        assert float(row["samples_per_second"]) == pytest.approx(4 * float(row["steps_per_second"]))
    board = events.EventAccumulator(str(tmp_path / "out/tensorboard"))
    board.Reload()
    assert [each.value for each in board.Scalars("loss")] == pytest.approx([float(row["loss"]) for row in logged])
    assert (tmp_path / "out/model.safetensors").exists()


def test_without_loggers_nothing_more_is_written(settings: dict[str, str], tmp_path: Path) -> None:
    assert run(settings) == 0
    assert not {"log.csv", "run_id.txt", "tensorboard", "wandb"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_a_resumed_run_keeps_its_id_its_rows_and_its_token_count(settings: dict[str, str], tmp_path: Path) -> None:
    saving = {"checkpoint__save": "true", "checkpoint__save_steps": "2", "training__resume": "auto"}
    assert run(settings, checkpoint__num_steps="2", **saving, **ALL) == 0
    first = (tmp_path / "out/run_id.txt").read_text()
    assert run(settings, **saving, **ALL) == 0
    assert (tmp_path / "out/run_id.txt").read_text() == first
    whole = table(tmp_path / "out/log.csv")
    assert [row["step"] for row in whole] == ["1", "2", "3", "4"]
    assert run(settings, training__output_dir=str(tmp_path / "straight"), **ALL) == 0
    straight = table(tmp_path / "straight/log.csv")
    for name in ("loss", "lr", "tokens", "grad_norm", "epoch"):
        assert [row[name] for row in whole] == [row[name] for row in straight]
    assert (tmp_path / "straight/run_id.txt").read_text() != first


def test_a_logger_that_fails_is_said_once_and_changes_nothing(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def jam(*given: object) -> None:
        raise OSError("paper jam")

    broken = loggers.load("tensorboard")
    monkeypatch.setattr(broken, "package", None)
    monkeypatch.setattr(broken, "__init__", lambda self, run: None)
    monkeypatch.setattr(broken, "log", jam)
    assert run(settings, logging__report_to="[tensorboard, csv]", logging__records_per_second="1e6") == 0
    said = capsys.readouterr().err
    assert said.count("warning: logging to tensorboard failed, the run goes on without it: OSError: paper jam") == 1
    assert len(table(tmp_path / "out/log.csv")) == 4
    assert (tmp_path / "out/report.html").exists()


def test_a_fast_run_says_how_much_it_left_out(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = {"logging__records_per_second": "0.5", "logging__report_to": "[csv]", "training__evaluate": "false"}
    assert run(settings, **slow) == 0
    rows = table(tmp_path / "out/log.csv")
    left_out = 4 - len(rows)
    assert left_out > 0
    assert rows[-1]["step"] == "4"
    assert f"{left_out} records were left out of csv: logging.records_per_second=0.5" in capsys.readouterr().out
    assert len(table(tmp_path / "out/per_step_metrics.csv")) == 4
