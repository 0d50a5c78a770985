"""Whose folder a resumed run writes to."""

from pathlib import Path

import pytest

from tests.apps.test_train_llm import run


def test_another_runs_folder_is_not_the_one_to_go_on_in(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run whose checkpoints lie elsewhere, resumed into a folder that holds another finished run."""
    settings |= {"training.max_steps": "1", "training.evaluate": "false"}
    other = tmp_path / "other"
    assert run(settings, training__output_dir=str(other)) == 0
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    settings |= {"checkpoint.save": "true", "checkpoint.save_path": str(tmp_path / "saved"), "training.resume": "auto"}
    assert run(settings) == 0
    capsys.readouterr()
    assert run(settings, training__output_dir=str(other)) == 2
    assert "holds another run" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    assert run(settings) == 0
    assert "Nothing is left to do" in capsys.readouterr().out
    assert run(settings, training__output_dir=str(other), training__overwrite_output_dir="true") == 0
    assert "Nothing is left to do" not in capsys.readouterr().out


def test_a_place_to_load_from_that_is_not_loaded_from_is_told(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"training.max_steps": "1", "training.evaluate": "false", "lora.alpha": "16"}
    assert run(settings, checkpoint__load_path=str(tmp_path / "there")) == 0
    place, alpha = capsys.readouterr().err.splitlines()
    assert place.startswith(f"warning: checkpoint.load_path={tmp_path / 'there'} is not read")
    assert alpha.startswith("warning: lora.alpha=16 is not read")
