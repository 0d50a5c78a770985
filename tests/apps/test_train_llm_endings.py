"""However a run ends, what it has done is kept; and what would end it badly is told before it starts."""

import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from apps.training.checkpointing.writer import CheckpointWriter
from apps.training.eager_program import EagerProgram
from apps.training.trainer import Trainer
from backends.errors import UserError
from tests.apps.test_train_llm import SCRIPT, arguments, metrics, run


def test_ctrl_c_that_ends_the_reader_too_saves_all_the_same(settings: dict[str, str], tmp_path: Path) -> None:
    """`python apps/train_llm.py … 2>&1 | tee log`: the terminal's Ctrl-C goes to both."""
    command = [sys.executable, str(SCRIPT), *arguments(settings | {"training.max_steps": "1000000"})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "Step [3/" in line:
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "out" / "report.html").exists()
    assert len(metrics(tmp_path / "out")) >= 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_error_lets_the_checkpoint_on_its_way_arrive(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, step, taken = CheckpointWriter._write_share, EagerProgram.train_step, []

    def slow(*given: object) -> object:
        time.sleep(0.5)
        return write(*given)

    def damaged(*given: object) -> object:
        taken.append(given)
        if len(taken) == 3:
            raise UserError("A row is damaged.")
        return step(*given)

    monkeypatch.setattr(CheckpointWriter, "_write_share", slow)
    monkeypatch.setattr(EagerProgram, "train_step", damaged)
    assert run(settings, checkpoint__save="true", checkpoint__save_steps="2") == 2
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["iter_2"]


def test_a_disk_that_is_full_for_a_while_costs_no_row(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows, step = iter([room[0], 300, 300, room[0]]), EagerProgram.train_step

    def filling(*given: object) -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (next(rows), room[1]))
        return step(*given)

    monkeypatch.setattr(EagerProgram, "train_step", filling)
    try:
        assert run(settings) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "per_step_metrics.csv': File too large. The run goes on" in warning
    assert [row["Step"] for row in metrics(tmp_path / "out")] == ["1", "2", "3", "4"]


def test_a_run_stopped_in_its_last_evaluation_makes_it_up(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saving meanwhile takes as long as it takes: the watch hears of it."""
    settings |= {"training.max_steps": "2", "checkpoint.save": "true", "training.resume": "auto"}
    evaluate, said = Trainer.evaluate, []

    def stopped(*given: object, **named: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return evaluate(*given, **named)

    def while_saving(*_: object) -> None:
        said.append([thread.name for thread in threading.enumerate() if thread.name == "busy"])

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", stopped)
        patch.setattr("apps.training.outcome.save_trained", while_saving)
        assert run(settings) == 130
    assert said == [["busy"]]
    assert "Evaluation" not in (tmp_path / "out" / "summary.txt").read_text()
    assert run(settings) == 0
    assert "Evaluation" in (tmp_path / "out" / "summary.txt").read_text()
    assert "Sample text" in (tmp_path / "out" / "report.html").read_text()
    assert [row["Step"] for row in metrics(tmp_path / "out")] == ["1", "2"]
    capsys.readouterr()
    assert run(settings) == 0
    assert "Nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize("lora", [{}, {"lora__r": "2"}])
@pytest.mark.parametrize("harm", ["empty", "damaged"])
def test_a_tokenizer_that_cannot_be_loaded_is_told_before_the_first_step(
    settings: dict[str, str],
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: str,
    lora: dict[str, str],
) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, dataset)
    if harm == "empty":
        shutil.rmtree(dataset / "tokenizer")
        (dataset / "tokenizer").mkdir()
    else:
        (dataset / "tokenizer" / "tokenizer.json").write_text("{}")
    assert run(settings, training__dataset=str(dataset), **lora) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert ("has no tokenizer" if harm == "empty" else "The tokenizer cannot be loaded") in error
    assert not (tmp_path / "out").exists()


def test_a_killed_run_is_offered_to_go_on_before_it_is_replaced(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "checkpoints" / "iter_20").mkdir(parents=True)
    (tmp_path / "out" / "per_step_metrics.csv").touch()
    assert run(settings) == 2
    assert f"by training.resume=auto: {tmp_path}/out/checkpoints holds its checkpoints" in capsys.readouterr().err
